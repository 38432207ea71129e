"""The catalogue of errors: complete, drawn as it is, filled by whoever raises, and made of sentences.

What the raisers pass is read from the source, so that a placeholder nobody fills is found here, and not by the user
whose disk is full.
"""

import ast
import inspect
import pickle
import re
import string
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import lockstep
from lockstep import errors
from lockstep.cli.main import app
from lockstep.errors import LockstepError

SOURCES = Path(lockstep.__file__).parent
TREE_LINE = re.compile(r"^    [│├└─ ]*(?P<name>[A-Z]\w+) +(?P<code>\d)  (?P<meaning>\S.*)$", re.MULTILINE)


def drawn_tree() -> dict[str, int]:
    """Branch -> exit code, as the module's docstring draws them."""
    return {found["name"]: int(found["code"]) for found in TREE_LINE.finditer(errors.__doc__ or "")}


def every_class() -> list[type[LockstepError]]:
    return [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, LockstepError)]


LEAVES = [each for each in every_class() if each.__name__ not in drawn_tree()]
every_leaf = pytest.mark.parametrize("error", LEAVES, ids=lambda each: each.__name__)


def texts(error: type[LockstepError]) -> tuple[str, str, str]:
    return error.happened, error.cause, error.next_step


def placeholders(*templates: str) -> set[str]:
    return {name for text in templates for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def documented(error: type[LockstepError]) -> set[str] | None:
    """The names after "Data:" in the docstring, without what is said of them; None where there is no such line."""
    found = re.match(r"Data: ([^.]*)", inspect.getdoc(error) or "")
    return set(re.sub(r"\([^)]*\)", "", found[1]).replace(" ", "").split(",")) if found else None


def raised() -> dict[str, list[tuple[str, set[str]]]]:
    """Class -> (place, keywords) of each call in the source that names the class."""
    calls: dict[str, list[tuple[str, set[str]]]] = defaultdict(list)
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                place = f"{path.relative_to(SOURCES)}:{node.lineno}"
                calls[node.func.id].append((place, {keyword.arg or "**" for keyword in node.keywords}))
    return calls


def named_outside_the_catalogue() -> set[str]:
    return {
        node.id
        for path in SOURCES.rglob("*.py")
        if path.name != "errors.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name)
    }


def filled(error: type[LockstepError]) -> LockstepError:
    """One with every placeholder filled, and nothing else."""
    return error(**dict.fromkeys(placeholders(*texts(error)), "/dev/sdb"))


# --- the tree ---------------------------------------------------------------------------------------------


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn = drawn_tree()
    assert len(drawn) >= 8
    assert {name: getattr(errors, name).exit_code for name in drawn} == drawn
    below_the_root = {each.__name__ for each in LockstepError.__subclasses__()}
    assert set(drawn) == {"LockstepError"} | below_the_root


def test_the_exit_codes_are_those_of_the_contract() -> None:
    # DESIGN section 5: 0 done, 1 failed, 2 usage, 3 differences found, 4 not permitted.
    codes = (errors.LockstepError, errors.UsageError, errors.DifferencesFound, errors.NotPermitted)
    assert [each.exit_code for each in codes] == [1, 2, 3, 4]


@every_leaf
def test_a_leaf_hangs_on_drawn_branches_and_takes_their_exit_code(error: type[LockstepError]) -> None:
    branches = [base.__name__ for base in error.__bases__]
    assert branches
    assert set(branches) <= set(drawn_tree())
    assert "exit_code" not in vars(error), "the exit code belongs to the branch"
    special = {drawn_tree()[name] for name in branches} - {1}
    assert error.exit_code == (special.pop() if special else 1)
    assert not special, "two branches with different exit codes"


@every_leaf
def test_another_process_can_be_told_of_it(error: type[LockstepError]) -> None:
    one = filled(error)
    other = pickle.loads(pickle.dumps(one))
    assert (type(other), other.data, str(other)) == (type(one), one.data, str(one))


# --- the texts --------------------------------------------------------------------------------------------


@every_leaf
def test_every_leaf_says_what_happened_why_and_what_to_do(error: type[LockstepError]) -> None:
    for name in ("happened", "cause", "next_step"):
        assert vars(error).get(name), f"{error.__name__} has no {name} of its own"


@every_leaf
def test_each_text_is_a_sentence(error: type[LockstepError]) -> None:
    for text in texts(error):
        assert text == text.strip()
        assert "  " not in text
        assert "\n" not in text
        assert re.match(r"[A-Z{]|(cryptsetup )", text), text
        # A whole text may be left to the raiser (advice), or end with what he found out.
        assert text.endswith((".", ").", "{advice}", "{hint}", "{reason}")), text
        assert text.count("`") % 2 == 0, text
        assert text.count("(") == text.count(")"), text


@every_leaf
def test_the_filled_texts_have_nothing_left_to_fill(error: type[LockstepError]) -> None:
    example = filled(error)
    for text in (str(example), example.likely_cause, example.advice):
        assert text
        assert not re.search(r"[{}]", text), text
    assert set(example.data) == placeholders(*texts(error))


# --- the raisers ------------------------------------------------------------------------------------------


@every_leaf
def test_what_is_documented_is_what_the_texts_use_and_no_less(error: type[LockstepError]) -> None:
    names = documented(error)
    if names is not None:
        assert placeholders(*texts(error)) <= names


def calls() -> Iterator[tuple[type[LockstepError], str, set[str]]]:
    leaves = {each.__name__: each for each in LEAVES}
    for name, places in raised().items():
        if name in leaves:
            yield from ((leaves[name], place, keywords) for place, keywords in places)


@pytest.mark.parametrize(
    ("error", "place", "keywords"), [pytest.param(*each, id=f"{each[0].__name__}-{each[1]}") for each in calls()]
)
def test_every_raiser_fills_every_placeholder(error: type[LockstepError], place: str, keywords: set[str]) -> None:
    assert "**" not in keywords, f"{place}: what is passed cannot be seen"
    assert placeholders(*texts(error)) <= keywords, place
    names = documented(error)
    if names is not None:
        assert keywords == names, f"{place}: the docstring documents {sorted(names)}"


def test_no_row_of_the_catalogue_is_dead() -> None:
    dead = {each.__name__ for each in LEAVES} - named_outside_the_catalogue()
    assert not dead


def test_a_placeholder_that_nobody_fills_is_noticed_at_once() -> None:
    with pytest.raises(KeyError):
        errors.DiskMissing()


# --- what the texts tell people to type -------------------------------------------------------------------


def advised(pattern: str) -> set[tuple[str, str]]:
    return {(each.__name__, found) for each in LEAVES for text in texts(each) for found in re.findall(pattern, text)}


def known_commands() -> dict[str, Any]:
    """Name -> command; those of a group as "group command", beside the group itself."""
    root: Any = get_command(app)
    found: dict[str, Any] = {}
    with root.make_context("lockstep", ["list"]) as context:
        for name in root.list_commands(context):
            found[name] = root.get_command(context, name)
            found |= {f"{name} {own}": command for own, command in getattr(found[name], "commands", {}).items()}
    return found


def test_every_command_that_a_text_advises_exists() -> None:
    known = known_commands()
    groups = {name.partition(" ")[0] for name in known if " " in name}
    commands = advised(r"`(?:sudo )?lockstep ([a-z-]+(?: [a-z]+)?)")
    assert commands
    missing = {
        (error, command)
        for error, command in commands
        if (command if command.partition(" ")[0] in groups else command.partition(" ")[0]) not in known
    }
    assert not missing


def test_every_option_that_a_text_advises_exists() -> None:
    known = {"--state-dir"}
    for command in known_commands().values():
        known |= {option for parameter in command.params for option in parameter.opts}
    # What stands in backquotes is another program's, unless it begins with lockstep.
    options = {
        (each.__name__, option)
        for each in LEAVES
        for text in texts(each)
        for part in re.findall(r"`((?:lockstep|--)[^`]*)`|`[^`]*`|([^`]+)", text)
        for option in re.findall(r"--[a-z][a-z-]+", " ".join(part))
    }
    assert len(options) > 5
    assert not {(error, option) for error, option in options if option not in known}


def test_a_reason_that_is_another_errors_sentence_ends_where_ours_goes_on() -> None:
    missing = errors.DiskMissing(path="/dev/sdx")
    told = errors.VerifyIncomplete(mirror="/m", reason=str(missing), volume="vol")
    assert str(missing).endswith(".")
    assert str(missing)[:-1] in str(told)
    assert ".." not in str(told)
    assert told.data["reason"] == str(missing)
