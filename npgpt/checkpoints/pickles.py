"""Pickles read as data: a small stack machine that imports nothing and calls nothing but what it is handed.

A pickle is a program for a stack machine (CPython, Lib/pickletools.py, whose disassembler is used here). Python's own
machine imports whatever a pickle names and calls it, which is how a checkpoint runs its author's code. In this one a
global is only a name, and calling it looks the name up in a table; a name that is not there is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import NpgptError

MOST_STEPS = 1_000_000  # instructions; one makes one object at most, so this bounds memory
MOST_ARGUMENTS = 16  # of a call; a long tuple of them, handed over again and again, would be copied as often
LARGEST = 2**256  # a number; one of thousands of digits cannot even be printed
LARGEST_KEY = 2**60  # a number that is a key; hashes of larger ones coincide at will, and one search would take long
PLAIN = (str, int, float, bytes, bool, type(None))  # what may be a key: the hash of a tuple would recurse

# Instructions whose argument is the value itself.
VALUES = frozenset(
    """INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE
    SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8""".split()
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
OPAQUE = object()  # a value that nothing is made of


class Global:
    """A name that a pickle would have imported, such as torch._utils._rebuild_tensor_v2; here no more than its name."""

    def __init__(self, name: str) -> None:
        self.name = name


def read(
    program: bytes,
    source: str,
    calls: Mapping[str, Callable[..., object]],
    names: Mapping[str, object],
    persistent: Callable[[object], object],
) -> object:
    """The value of a pickle. calls: what may be called, names: what may only be mentioned; persistent turns a
    persistent id into its object. source names the pickle in errors.

    Dictionaries and lists are Python's own, and so are numbers and text. Raises NpgptError for a name in neither table,
    for an instruction that a checkpoint has no use for, and for a program that is malformed or endless.
    """

    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[object, Any] = {}

    def pop(count: int | None = None) -> list[Any]:
        """The topmost values, none of them below the last mark; by default all above it, and the mark goes, too."""
        if count is None:
            if not marks:
                raise ValueError("there is no mark")
            count = len(stack) - marks.pop()
        start = len(stack) - count
        if start < (marks[-1] if marks else 0):
            raise ValueError("the stack is empty")
        values = stack[start:]
        del stack[start:]
        return values

    def mentioned(name: str) -> object:
        """What a global is: its value in names, or no more than its name."""
        if name not in calls and name not in names:
            raise NpgptError(
                f"{source} asks for {name:.200}, which npgpt does not run: only tensors and plain values are read; "
                "save the bare weights with torch.save(model.state_dict(), …)"
            )
        return names[name] if name in names else Global(name)

    def outcome(op: str, argument: Any) -> object:
        """What an instruction puts on the stack, after it took its values from there."""
        match op:
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                return tuple(pop(int(op[-1])))
            case "TUPLE":
                return tuple(pop())
            case "EMPTY_LIST" | "EMPTY_DICT":
                return [] if op == "EMPTY_LIST" else {}
            case "LIST":
                return pop()
            case "DICT":
                return _filled({}, pop())
            case "SETITEM" | "SETITEMS":
                items = pop(2 if op == "SETITEM" else None)
                return _filled(pop(1)[0], items)
            case "APPEND" | "APPENDS":
                items = pop(1 if op == "APPEND" else None)
                return _extended(pop(1)[0], items)
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                place = len(memo) if op == "MEMOIZE" else argument
                if not 0 <= place < 2**32:
                    raise ValueError("a value is kept under a number that is none of pickle's own")
                (memo[place],) = pop(1)
                return memo[place]
            case "GET" | "BINGET" | "LONG_BINGET":
                return memo[argument]
            case "GLOBAL":
                return mentioned(argument.replace(" ", ".", 1))
            case "STACK_GLOBAL":
                module, name = pop(2)
                if not isinstance(module, str) or not isinstance(name, str):
                    raise ValueError("a global's name is no text")
                return mentioned(f"{module}.{name}")
            case "BINPERSID":
                return persistent(pop(1)[0])
            case "REDUCE":
                function, arguments = pop(2)
                if not isinstance(function, Global) or not isinstance(arguments, tuple):
                    raise ValueError("what is called is no function")
                if len(arguments) > MOST_ARGUMENTS:
                    raise ValueError(f"{function.name} is called with {len(arguments)} arguments")
                return calls[function.name](*arguments)
            case "BUILD":
                target, _ = pop(2)  # attributes, such as a state dict's _metadata: nothing that npgpt needs
                if type(target) is not dict and target is not OPAQUE:
                    raise ValueError("attributes of what has none")
                return target
            case "INST":
                mentioned(argument.replace(" ", ".", 1))
                raise ValueError("INST makes an instance of a class")
        raise ValueError(f"the instruction {op} has no place in a checkpoint")

    try:
        for steps, (op, argument, _) in enumerate(pickletools.genops(program)):
            if op.name == "STOP":
                return pop(1)[0]
            if steps > MOST_STEPS:
                raise ValueError(f"more than {MOST_STEPS} instructions")
            if op.name == "MARK":
                marks.append(len(stack))
            elif op.name in CONSTANTS:
                stack.append(CONSTANTS[op.name])
            elif op.name in VALUES:
                if isinstance(argument, int) and abs(argument) >= LARGEST:
                    raise ValueError("a number has more than 256 bits")
                stack.append(argument)
            elif op.name not in ("PROTO", "FRAME"):  # which have no effect
                stack.append(outcome(op.name, argument))
    except NpgptError:
        raise
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise NpgptError(f"{source} is malformed: {str(error)!r:.200}") from None
    raise NpgptError(f"{source} is malformed: it ends without an end")


def _filled(target: object, items: list[Any]) -> dict[Any, Any]:
    """The dictionary itself, with keys and values in it that stand one after the other."""
    if type(target) is not dict or len(items) % 2:
        raise ValueError("items belong into a dictionary, in pairs")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, PLAIN) or (isinstance(key, int) and abs(key) >= LARGEST_KEY):
            raise ValueError("a key is neither text nor a number of usual size")
        target[key] = value
    return target


def _extended(target: object, items: list[Any]) -> list[Any]:
    """The list itself, with more items in it."""
    if type(target) is not list:
        raise ValueError("items belong into a list")
    target.extend(items)
    return target
