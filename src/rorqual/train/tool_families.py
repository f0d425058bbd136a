"""The functions tool-use conversations declare: names, parameters, requests, results, answers.

Each family is a function people really offer, under several names and parameter spellings, so
that a call has to be copied from the declared schema. Tables only; ``tool_use`` makes
conversations of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from rorqual.train import lexicon

Arguments = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One argument: the key of its value, the names it may have, its JSON type and source."""

    key: str
    names: tuple[str, ...]
    kind: Literal["string", "number", "integer", "boolean"]
    value: Callable[[Random], Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of function.

    ``requests`` are formatted with the argument values, ``answers`` with arguments and result.
    ``result`` draws the fields of the JSON the tool returns.
    """

    names: tuple[str, ...]
    description: str
    parameters: tuple[Parameter, ...]
    requests: tuple[str, ...]
    result: Callable[[Random], Arguments]
    answers: tuple[str, ...]


def _text(key: str, value: Callable[[Random], str], *names: str) -> Parameter:
    return Parameter(key=key, names=names or (key,), kind="string", value=value)


def _integer(key: str, low: int, high: int, *names: str) -> Parameter:
    return Parameter(
        key=key, names=names or (key,), kind="integer", value=lambda r: r.randint(low, high)
    )


_CURRENCIES = ("USD", "EUR", "GBP", "JPY", "CHF", "CAD", "INR", "BRL")
_LANGUAGES = ("French", "German", "Spanish", "English", "Italian", "Chinese")


def _symbol(rng: Random) -> str:
    return "".join(rng.choice("ABCDEFGHIJKLMNOPRSTUVWXYZ") for _ in range(rng.choice((3, 4))))


def _order_id(rng: Random) -> str:
    return f"{rng.choice('ABCD')}{rng.randint(100, 9999)}"


def _email(rng: Random) -> str:
    return f"{rng.choice(lexicon.FIRST_NAMES).lower()}{rng.randint(1, 99)}@mail.com"


FAMILIES = (
    Family(
        names=("get_weather", "weather_lookup", "current_weather"),
        description="Get the current weather of a city.",
        parameters=(_text("city", lexicon.city, "city", "location", "place"),),
        requests=(
            "What is the weather in {city}?",
            "How is the weather in {city} today?",
            "Weather in {city}, please.",
        ),
        result=lambda r: {
            "temperature": r.randint(-9, 39),
            "condition": r.choice(("sunny", "cloudy", "rain", "snow", "windy", "clear")),
        },
        answers=("In {city} it is {temperature} degrees and {condition}.",),
    ),
    Family(
        names=("get_stock", "stock_price", "quote_stock"),
        description="Get the current price of a stock.",
        parameters=(_text("symbol", _symbol, "symbol", "ticker"),),
        requests=("What is the stock price of {symbol}?", "How much is {symbol} stock now?"),
        result=lambda r: {"price": r.randint(100, 99999) / 100, "currency": "USD"},
        answers=("The price of {symbol} is {price} {currency}.",),
    ),
    Family(
        names=("convert_currency", "exchange_money"),
        description="Convert an amount of money to another currency.",
        parameters=(
            _integer("amount", 2, 9999),
            _text("source", lambda r: r.choice(_CURRENCIES[:4]), "from", "source", "from_currency"),
            _text("target", lambda r: r.choice(_CURRENCIES[4:]), "to", "target", "to_currency"),
        ),
        requests=(
            "Convert {amount} {source} to {target}.",
            "How much is {amount} {source} in {target}?",
        ),
        result=lambda r: {"converted": r.randint(100, 99999) / 100},
        answers=("{amount} {source} is {converted} {target}.",),
    ),
    Family(
        names=("lookup_order", "get_order", "order_status"),
        description="Look up the status of an order.",
        parameters=(_text("order", _order_id, "order_id", "id", "order"),),
        requests=("Where is my order {order}?", "What is the status of order {order}?"),
        result=lambda r: {
            "status": r.choice(("shipped", "delivered", "open", "lost", "paid")),
            "days": r.randint(1, 30),
        },
        answers=("Order {order} is {status}; days left: {days}.",),
    ),
    Family(
        names=("search_contacts", "find_contact"),
        description="Search the contacts for a person.",
        parameters=(_text("name", lexicon.person, "name", "query", "person"),),
        requests=("What is the phone number of {name}?", "Find the contact {name}."),
        result=lambda r: {"phone": f"{r.randint(100, 999)}-{r.randint(1000, 9999)}"},
        answers=("The phone number of {name} is {phone}.",),
    ),
    Family(
        names=("set_timer", "start_timer"),
        description="Start a timer.",
        parameters=(_integer("minutes", 1, 120, "minutes", "duration"),),
        requests=("Set a timer for {minutes} minutes.", "Start a timer of {minutes} minutes."),
        result=lambda r: {"timer": r.randint(1, 99), "state": "running"},
        answers=("Timer {timer} is set for {minutes} minutes.",),
    ),
    Family(
        names=("get_time", "local_time"),
        description="Get the local time of a city.",
        parameters=(_text("city", lexicon.city, "city", "location"),),
        requests=("What time is it in {city}?", "Tell me the time in {city}."),
        result=lambda r: {"time": lexicon.clock_time(r)},
        answers=("It is {time} in {city}.",),
    ),
    Family(
        names=("find_flight", "search_flights"),
        description="Find a flight between two cities.",
        parameters=(
            _text("origin", lexicon.city, "origin", "from_city"),
            _text("goal", lexicon.city, "destination", "to_city"),
        ),
        requests=(
            "Find a flight from {origin} to {goal}.",
            "I need to fly from {origin} to {goal}.",
        ),
        result=lambda r: {"flight": lexicon.code(r), "price": r.randint(50, 999)},
        answers=("Flight {flight} from {origin} to {goal} costs {price}.",),
    ),
    Family(
        names=("book_table", "reserve_table"),
        description="Book a restaurant table.",
        parameters=(
            _integer("people", 1, 12, "people", "guests"),
            _text("time", lexicon.clock_time, "time", "at"),
        ),
        requests=("Book a table for {people} people at {time}.",),
        result=lambda r: {"booking": lexicon.code(r), "confirmed": True},
        answers=("Your table for {people} at {time} is booked: {booking}.",),
    ),
    Family(
        names=("send_message", "send_text"),
        description="Send a short message to a person.",
        parameters=(
            _text("name", lexicon.person, "to", "recipient"),
            _text(
                "text",
                lambda r: r.choice(
                    (
                        "I will be late",
                        "call me back",
                        "the plan has changed",
                        f"meet me at {lexicon.clock_time(r)}",
                        f"I am in {lexicon.city(r)}",
                    )
                ),
                "text",
                "message",
            ),
        ),
        requests=('Send "{text}" to {name}.', 'Write to {name}: "{text}"'),
        result=lambda r: {"sent": True, "message_id": r.randint(100, 9999)},
        answers=("I sent your message to {name}; its id is {message_id}.",),
    ),
    Family(
        names=("get_distance", "distance_between"),
        description="Get the distance between two cities in kilometers.",
        parameters=(
            _text("origin", lexicon.city, "start", "origin"),
            _text("goal", lexicon.city, "end", "destination"),
        ),
        requests=("How far is it from {origin} to {goal}?",),
        result=lambda r: {"kilometers": r.randint(20, 9999)},
        answers=("It is {kilometers} kilometers from {origin} to {goal}.",),
    ),
    Family(
        names=("check_stock", "get_inventory"),
        description="Check how many pieces of an item are available.",
        parameters=(_text("item", lambda r: r.choice(lexicon.ITEMS), "item", "product"),),
        requests=("How many {item} pieces are available?", "Check the inventory for {item}."),
        result=lambda r: {"available": r.randint(0, 500), "shelf": lexicon.code(r)},
        answers=("There are {available} pieces of {item} on shelf {shelf}.",),
    ),
    Family(
        names=("translate", "translate_text"),
        description="Translate a word into another language.",
        parameters=(
            _text("word", lambda r: r.choice(lexicon.ITEMS + lexicon.FOODS), "text", "word"),
            _text("language", lambda r: r.choice(_LANGUAGES), "language", "target_language"),
        ),
        requests=("What is {word} in {language}?", "Translate {word} into {language}."),
        result=lambda r: {"translation": lexicon.made_up_name(r).lower()},
        answers=("In {language}, {word} is {translation}.",),
    ),
    Family(
        names=("get_user", "user_info"),
        description="Get the account of a user by email.",
        parameters=(_text("email", _email, "email", "address"),),
        requests=("Who has the email {email}?", "Show the account of {email}."),
        result=lambda r: {"name": lexicon.person(r), "plan": r.choice(("free", "pro", "team"))},
        answers=("The email {email} belongs to {name} on the {plan} plan.",),
    ),
    Family(
        names=("add_event", "create_event"),
        description="Add an event to the calendar.",
        parameters=(
            _text(
                "title",
                lambda r: f"{r.choice(lexicon.TOPICS)} {r.choice(('class', 'test', 'meeting'))}",
                "title",
                "event",
            ),
            _text("day", lambda r: r.choice(lexicon.DAYS), "day", "date"),
        ),
        requests=("Add a {title} on {day}.", "Put {title} in my calendar for {day}."),
        result=lambda r: {"event_id": r.randint(100, 9999)},
        answers=("The {title} on {day} is in your calendar with id {event_id}.",),
    ),
    Family(
        names=("set_light", "switch_light"),
        description="Switch the light of a room on or off.",
        parameters=(
            _text("room", lambda r: f"{r.choice(lexicon.ADJECTIVES)} room", "room", "place"),
            Parameter(
                key="on", names=("on", "state"), kind="boolean", value=lambda r: r.random() < 0.5
            ),
        ),
        requests=("Light in the {room}: {on}.", "Set the light of the {room} to {on}."),
        result=lambda r: {"done": True, "watts": r.randint(0, 90)},
        answers=("The light of the {room} is set and uses {watts} watts.",),
    ),
)
