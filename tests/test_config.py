"""The strict reader and writer of settings, on a toy section."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml

from linearize.config import parse, to_yaml
from linearize.errors import RecipeError
from linearize.settings import Section, setting


@dataclass(frozen=True, kw_only=True)
class Wheel(Section):
    """A wheel."""

    radius: float = setting(0.3, help="metres", above=0)
    spokes: int = setting(32, help="number", minimum=3, maximum=64)


@dataclass(frozen=True, kw_only=True)
class Bicycle(Section):
    """A bicycle."""

    name: str = setting(help="what it is called")
    note: str | None = setting(None, help="anything")
    gears: int = setting(3, help="number", minimum=1)
    limit: int | None = setting(None, help="km/h", minimum=1)
    weight: float = setting(12.5, help="kg", minimum=1, below=100)
    electric: bool = setting(False, help="has a motor")
    kind: Literal["city", "road"] = setting("city", help="what for")
    sizes: list[int] = setting([1, 2], help="cm", minimum=0, unique=True)
    tags: list[str] = setting([], help="words")
    source: str | list[str] = setting("shop", help="where from", nonempty=True)
    wheel: Wheel = field(default_factory=Wheel)
    hidden: str = field(default="", compare=False, metadata={"yaml": False})

    def check(self):
        if self.electric and self.weight < 10:
            yield f"weight: {self.weight} is too little for an electric one"


def read(text: str, overrides=(), **hidden) -> Bicycle:
    return parse(Bicycle, "name: x\n" + text, where="b.yaml", overrides=overrides, **hidden)


def problems(text: str, overrides=()) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse(Bicycle, text, where="b.yaml", overrides=overrides)
    head, *lines = str(caught.value).splitlines()
    assert head in ("b.yaml has a problem:", f"b.yaml has {len(lines)} problems:")
    return [line.removeprefix("  ") for line in lines]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("20M", 20_000_000),
        ("16k", 16_000),
        ("1.5B", 1_500_000_000),
        ("2_000", 2000),
        ("1e6", 1_000_000),
        ("+3", 3),
        ("4.0", 4),
        ("2.5e1", 25),
    ],
)
def test_int_is_read(text, value):
    got = read(f"gears: {text}").gears
    assert got == value and type(got) is int


@pytest.mark.parametrize(
    "text",
    [
        "1.5",
        "20m",
        "'4'",
        '"4"',
        "true",
        "010",
        "0x10",
        "1:30",
        "1 000",
        "2__0",
        "2_",
        "k",
        "[1]",
        "{a: 1}",
        "",
        "null",
        ".inf",
        "1e-3",
        "1.5e0",
        "٣",
    ],
)
def test_int_is_refused(text):
    (problem,) = problems(f"name: x\ngears: {text}")
    assert problem.startswith("gears (line 2): must be a whole number")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1.0e-3", 1e-3), ("2", 2.0), (".5", 0.5), ("3.", 3.0), ("1e1", 10.0), ("0.02k", 20.0)],
)
def test_float_is_read(text, value):
    wheel = read(f"wheel: {{radius: {text}}}").wheel
    assert wheel.radius == value and type(wheel.radius) is float


@pytest.mark.parametrize("text", ["'1'", "x", "true", "null", "nan", ".nan", "inf", "1,5", "[1]", "--1"])
def test_float_is_refused(text):
    (problem,) = problems(f"name: x\nwheel:\n  radius: {text}")
    assert problem.startswith("wheel.radius (line 3): must be a number")


def test_float_that_overflows_is_refused():
    assert problems("name: x\nwheel: {radius: 1e999}") == ["wheel.radius (line 2): must be finite, is inf"]


@pytest.mark.parametrize("text", ["yes", "on", "1", "'true'", "null", "TRUE", "[true]"])
def test_bool_takes_only_true_and_false(text):
    assert read("electric: true").electric is True
    assert read("electric: False").electric is False
    (problem,) = problems(f"name: x\nelectric: {text}")
    assert problem.startswith("electric (line 2): must be true or false, is ")


@pytest.mark.parametrize("text", ["no", "1e5", "010", "2024-01-01", "20M", "a/b:c.txt", "12"])
def test_text_is_taken_as_written(text):
    assert read(f"note: {text}").note == text
    assert read(f"note: '{text}'").note == text


@pytest.mark.parametrize("text", ["null", "~", ""])
def test_null_is_none_only_where_allowed(text):
    assert read(f"note: {text}").note is None
    assert read(f"limit: {text}").limit is None
    assert problems(f"name: {text}") == ["name (line 1): must be text, is empty"]


def test_quoted_null_is_text_and_empty_text_is_refused():
    assert read("note: 'null'").note == "null"
    assert problems("name: ' '") == ["name (line 1): must not be empty text"]


def test_choice():
    assert read("kind: road").kind == read("kind: 'road'").kind == "road"
    assert problems("name: x\nkind: raod") == [
        "kind (line 2): must be one of city, road, is 'raod'; did you mean 'road'?"
    ]


def test_lists_and_unions():
    assert read("sizes: [3, 1k]").sizes == [3, 1000]
    assert read("sizes: []").sizes == []
    assert read("source: shop").source == "shop"
    assert read("source: [a, b]").source == ["a", "b"]
    assert problems("name: x\nsizes: 3")[0].startswith("sizes (line 2): must be a list, each a whole number")
    assert problems("name: x\nsizes: [a]")[0].startswith("sizes (line 2): must be a whole number")
    assert problems("name: x\nsizes: [1, 1]") == ["sizes (line 2): must not repeat an entry, is [1, 1]"]
    assert problems("name: x\nsizes: [1, -1]") == ["sizes (line 2): must be at least 0, is -1"]
    assert problems("name: x\nsource: []") == ["source (line 2): must not be an empty list"]
    assert problems("name: x\nsource: {a: b}")[0].startswith("source (line 2): must be text, is a group")


def test_a_default_list_is_not_shared():
    assert read("").sizes is not read("").sizes


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("gears: 0", "gears (line 2): must be at least 1, is 0"),
        ("weight: 100", "weight (line 2): must be below 100, is 100.0"),
        ("wheel: {radius: 0}", "wheel.radius (line 2): must be above 0, is 0.0"),
        ("wheel: {spokes: 65}", "wheel.spokes (line 2): must be at most 64, is 65"),
        ("limit: 0", "limit (line 2): must be at least 1, is 0"),
    ],
)
def test_limits(text, problem):
    assert problems("name: x\n" + text) == [problem]


def test_unknown_names_the_nearest_by_full_name():
    assert problems("name: x\ngeers: 1") == ["geers (line 2): no such setting; did you mean 'gears'?"]
    assert problems("name: x\nwheel: {spoke: 1}") == [
        "wheel.spoke (line 2): no such setting; did you mean 'wheel.spokes'?"
    ]
    # right name, wrong group
    assert problems("name: x\nradius: 1") == [
        "radius (line 2): no such setting; did you mean 'wheel.radius'?"
    ]
    assert problems("name: x\nwheel: {qqq: 1}") == [
        "wheel.qqq (line 2): no such setting; known: radius, spokes"
    ]
    assert problems("name: x\nhidden: y")[0].startswith("hidden (line 2): no such setting")
    assert problems("name: x\n[a]: y")[0].startswith("a list (line 2): no such setting")


def test_duplicate_key():
    assert problems("name: x\ngears: 1\ngears: 2") == ["gears (line 3): written twice, first on line 2"]


def test_all_problems_at_once_with_their_lines():
    text = "gears: x\nwheel:\n  radius: -1\n  spok: 3\nelectric: maybe\n"
    assert [problem.partition(":")[0] for problem in problems(text, ["nope=1", "sizes=a"])] == [
        "--set nope",
        "name",
        "gears (line 1)",
        "electric (line 5)",
        "sizes (--set)",
        "wheel.spok (line 4)",
        "wheel.radius (line 3)",
    ]


def test_check_across_fields():
    assert problems("name: x\nelectric: true\nweight: 5") == ["weight: 5.0 is too little for an electric one"]


@pytest.mark.parametrize(
    "text", ["name: [", "name: 'x", "name: x\n\tgears: 1", "a: *b", "name: x\n---\nname: y", "\x00"]
)
def test_broken_yaml_is_one_problem(text):
    (problem,) = problems(text)
    assert "not valid YAML" in problem


def test_not_a_group():
    assert problems("- name")[0].startswith("everything (line 1): must be a group with name, note")
    assert problems("name: x\nwheel: 3") == ["wheel (line 2): must be a group with radius, spokes, is '3'"]
    assert read("wheel:\n").wheel == Wheel()  # a group with nothing in it


def test_overrides():
    bike = read(
        "gears: 1\nweight: bad",
        [
            "gears=2",
            "gears=4k",
            "note=a=b",
            "sizes=0,1",
            "tags=[a, b]",
            "wheel.radius=1e-3",
            "weight=20",
            "source=a,b",
        ],
    )
    assert (bike.gears, bike.note, bike.sizes, bike.tags) == (4000, "a=b", [0, 1], ["a", "b"])
    assert (bike.wheel.radius, bike.weight) == (1e-3, 20.0)
    assert bike.source == "a,b"  # text first: a path may hold a comma
    assert read("", ["sizes=7"]).sizes == [7]
    assert read("", ["sizes=[]"]).sizes == []
    assert read("note: y", ["note="]).note is None
    assert read("note: y", ["note=null"]).note is None
    assert read("", [" gears = 2"]).gears == 2


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("gears", "--set gears: write it as name=value"),
        ("wheel=1", "--set wheel: is a group; set one of wheel.radius, wheel.spokes"),
        ("wheel.spoks=1", "--set wheel.spoks: no such setting; did you mean 'wheel.spokes'?"),
        ("spokes=1", "--set spokes: no such setting; did you mean 'wheel.spokes'?"),
        ("gears=x", "gears (--set): must be a whole number (64, 16k, 20M), is 'x'"),
        ("gears='2'", "gears (--set): must be a whole number (64, 16k, 20M), is the quoted text '2'"),
        ("sizes=", "sizes (--set): must be a list, each a whole number (64, 16k, 20M), is ''"),
    ],
)
def test_bad_overrides(override, problem):
    assert problems("name: x", [override]) == [problem]


def test_override_that_is_not_yaml():
    (problem,) = problems("name: x", ["note=*.txt"])
    assert problem.startswith("--set note=*.txt: not valid YAML")


def test_built_in_python_it_is_checked_as_well():
    with pytest.raises(RecipeError, match="gears: must be .*, is '3'\nelectric: must be true or"):
        Bicycle(name="x", gears="3", electric=1)
    with pytest.raises(RecipeError, match="gears: must be a whole number .*, is True"):
        Bicycle(name="x", gears=True)
    with pytest.raises(RecipeError, match="kind: must be one of"):
        Bicycle(name="x", kind="boat")
    with pytest.raises(RecipeError, match="sizes: must be at least 0"):
        Bicycle(name="x", sizes=[-1])
    with pytest.raises(RecipeError, match="wheel: must be Wheel"):
        Bicycle(name="x", wheel={"radius": 1})
    with pytest.raises(RecipeError, match="too little"):
        dataclasses.replace(Bicycle(name="x", electric=True), weight=2)
    assert Bicycle(name="x", weight=20).weight == 20


TEXTS = [
    "plain",
    "a/b",
    "package:x/y*.txt",
    "*.txt",
    "no",
    "null",
    "~",
    "1e-3",
    "12",
    "a: b",
    "a #b",
    "a\nb",
    "'",
    '"',
    "x ",
    "é",
    "😀",
    "{a}",
    "[a",
    "a, b",
    "&a",
    "!a",
    "%",
    "@",
    "`",
    "-",
    "- a",
    "?",
    "\t",
    "C:\\x",
    "\x85\u2028\ufeff",
    "=",
    "word " * 100,
    "2024-01-01",
    "<<",
    "\x7f",
    "a:",
    ":a",
    "https://x.y/z?q=1",
]


def test_to_yaml_round_trips_and_shows_every_default():
    plain = Bicycle(name="x")
    bikes = [plain, Bicycle(name="y", weight=1e1, limit=3, wheel=Wheel(radius=1e-7), sizes=[], electric=True)]
    bikes += [Bicycle(name=text, note=text, tags=[text, "z"]) for text in TEXTS if text.strip()]
    bikes += [Bicycle(name="x", wheel=Wheel(radius=radius)) for radius in (1e22, 5e-324, 1 / 3, 1.5e-5, 7)]
    for bike in bikes:
        text = to_yaml(bike, header="one\ntwo")
        assert text.startswith("# one\n# two\n")
        assert parse(Bicycle, text, where="x") == bike
        # any other YAML reader sees the same values and types
        tree = dataclasses.asdict(bike)
        del tree["hidden"]
        assert yaml.safe_load(text) == tree
    assert "  spokes: 32  # number\n" in to_yaml(plain)
    assert "wheel:  # A wheel.\n" in to_yaml(plain)


def test_hidden_fields_come_from_the_caller():
    assert read("", hidden="h").hidden == "h"
