"""The words generated tasks are made of, and the values their facts take.

Everyday words first, so that most cost one or two tokens of a 4096-entry vocabulary, and made-up
names so that a model learns to copy spellings it has never seen.
"""

from __future__ import annotations

from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "old new small large main public private open long short light hard early first second great "
    "little big high low local common strong free full real major general north south east west "
    "red blue green white black upper lower inner outer central quiet bright dark deep tall golden "
    "silver stone river royal modern"
)

NOUNS = _words(
    "school market mill team company group project program system plan model record book report "
    "case line car field cell test study course order gate hall tower bridge house hotel bank "
    "library museum garden park office shop farm road station harbor room lab center factory "
    "church hospital server network camp island train boat engine machine"
)

FIRST_NAMES = _words(
    "John Mary Anna Peter Paul Maria David Robert James Tom Sam Alex Max Ben Eva Lena Omar Ali "
    "Chen Lee Kim Ann Jack Mark Luke Emma Kate Nina Rosa Ivan Leo Carl Hugo Sara Lisa Jane"
)

LAST_NAMES = _words(
    "Stone Hill Field Park Wood Brown Green White Black Young King Long Short Mill Case Hall Bell "
    "Cole Ford Gray Hart Lane Moss Reed Shaw Todd Webb York Cross West North East"
)

CITIES = _words(
    "Paris London Rome Berlin Madrid Tokyo Lima Oslo Cairo Delhi Boston Chicago Vienna Prague "
    "Dublin Athens Milan Seoul Kyoto Lisbon Geneva Sydney Texas Toronto Nairobi Havana Bergen "
    "Porto Lyon Turin Leeds Basel Bonn Riga Quito Accra Hanoi Perth Denver Austin"
)

COLORS = _words("red blue green white black brown yellow orange purple pink gray gold silver")

MATERIALS = _words("wood steel glass stone iron paper gold clay brick copper leather cotton silk")

JOBS = _words(
    "doctor teacher student writer engineer driver artist cook nurse lawyer pilot farmer judge "
    "singer actor baker painter manager designer reporter"
)

ITEMS = _words(
    "lamp chair table clock phone radio camera ring map box bag coat hat key bell drum piano "
    "mirror bottle cup knife rope tent boat bike"
)

FOODS = _words("rice bread cheese soup fish apples eggs pasta beans cake honey nuts corn salad pie")

TOPICS = _words(
    "water music art history law math sport travel energy health food trade money language film "
    "science space weather climate fashion"
)

MONTHS = _words(
    "January February March April May June July August September October November December"
)

DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

_ONSETS = _words("b c d f g h j k l m n p r s t v w z br cl dr fl gr kr pl pr st th tr")
_VOWELS = _words("a e i o u ai ea ou")
_CODAS = ("", "", "", "n", "r", "l", "s", "m", "t", "nd", "x")


def made_up_name(rng: Random) -> str:
    """A capitalised pronounceable name of two or three syllables."""
    syllables = (
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        for _ in range(rng.choice((2, 2, 3)))
    )
    return "".join(syllables).capitalize()


def person(rng: Random) -> str:
    """A first and last name, sometimes with a made-up surname."""
    last = made_up_name(rng) if rng.random() < 0.2 else rng.choice(LAST_NAMES)
    return f"{rng.choice(FIRST_NAMES)} {last}"


def city(rng: Random) -> str:
    """A city, sometimes made up."""
    return made_up_name(rng) if rng.random() < 0.1 else rng.choice(CITIES)


def number(rng: Random) -> str:
    """An integer of two to four digits without leading zero."""
    low, high = rng.choice(((10, 99), (100, 999), (1000, 9999)))
    return str(rng.randint(low, high))


def code(rng: Random) -> str:
    """An identifier such as ``QX-472``, ``B1533`` or ``4712``."""
    form = rng.random()
    if form < 0.4:
        return str(rng.randint(1000, 9999))
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(2))
    if form < 0.7:
        return f"{letters}-{rng.randint(10, 999)}"
    return f"{letters[0]}{rng.randint(100, 9999)}"


def year(rng: Random) -> str:
    """A year between 1900 and 2026."""
    return str(rng.randint(1900, 2026))


def date(rng: Random) -> str:
    """A day of a month, as ``14 May``."""
    return f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"


def clock_time(rng: Random) -> str:
    """A time of day, as ``9:45``."""
    return f"{rng.randint(1, 23)}:{rng.choice(('00', '15', '30', '45'))}"


def with_article(noun: str) -> str:
    """``a lamp``, ``an apple``."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
