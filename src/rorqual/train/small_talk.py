"""A few greetings and questions about the model, so that a chat does not start with nonsense."""

from __future__ import annotations

from random import Random

from rorqual.train.conversation import Dialogue, Turn

_WHO = (
    "I am Rorqual nano, a small model. I can answer questions about a document you give me, "
    "and I can call tools."
)
_PAIRS = (
    (("Hi", "Hello", "Hi!", "Hello!", "Hey", "Good morning"), f"Hello! {_WHO}"),
    (
        ("Who are you?", "What are you?", "What can you do?", "Help", "How can you help me?"),
        _WHO,
    ),
    (("Thanks", "Thank you", "Thanks!", "Great, thank you."), "You are welcome."),
    (("Bye", "Goodbye", "See you"), "Goodbye!"),
    (
        ("How are you?", "How are you today?"),
        "I am well, thank you. Give me a document and a question about it.",
    ),
    (
        ("Tell me a story.", "Write a poem.", "Write some code.", "What is the meaning of life?"),
        "That is more than I can do. Give me a document and a question about it.",
    ),
)
_SYSTEMS = ("", "", "", "You are a helpful assistant.", "Be short.")


def make_dialogue(rng: Random) -> Dialogue:
    """One to three exchanges of small talk."""
    turns = []
    for _ in range(rng.randint(1, 3)):
        questions, reply = rng.choice(_PAIRS)
        turns.append(
            Turn(kind="chat", user=rng.choice(questions), content=reply, reasoning="Small talk.")
        )
    return Dialogue(
        task="chat", think=rng.random() < 0.4, turns=tuple(turns), system=rng.choice(_SYSTEMS)
    )
