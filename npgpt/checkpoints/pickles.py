"""Read pickles without executing them: a small interpreter rebuilds plain values and calls only given functions.

A pickle is a program for a stack machine, which pickletools only disassembles. Python's own machine imports and calls
whatever a pickle names, so a checkpoint can run arbitrary code. In this interpreter, a global is only a name. When it
is called, the name is looked up in a table. A call of any other name becomes a Record of the call, which is plain data.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import NpgptError

MOST_STEPS = 1_000_000  # instructions; each creates at most one object, so this limits memory
MOST_ARGUMENTS = 16  # of a call; each call copies its arguments, and a long tuple could be passed many times
LARGEST = 2**256  # for integers; Python refuses to print one of thousands of digits
LARGEST_KEY = 2**60  # for integer keys; larger ones can be chosen with colliding hashes, which makes lookups slow
PLAIN = (str, int, float, bytes, bool, type(None))  # types of keys; the hash of a tuple would recurse

# Instructions whose argument is the value itself.
VALUES = frozenset(
    """INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE
    SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8""".split()
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle asks to import, such as torch._utils._rebuild_tensor_v2."""

    name: str


@dataclass(eq=False, repr=False, slots=True)
class Record:
    """A call that was not made: its name and arguments, and what the pickle adds to the result.

    state is the argument of BUILD, usually a dict of attributes; contents are the items of a list or dict subclass.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    state: object = None
    contents: list[Any] | dict[Any, Any] | None = None

    def __repr__(self) -> str:
        """Return the name only: the contents may be arbitrarily large."""
        return f"<{self.name:.80}>"


def refusal(source: str, name: str) -> NpgptError:
    """Return the error for a needed value that only a name outside the tables could create."""
    return NpgptError(
        f"{source} asks for {name:.200}, which npgpt does not run: it reads only tensors and plain values; "
        "save only the weights with torch.save(model.state_dict(), …)"
    )


def read(
    program: bytes,
    source: str,
    calls: Mapping[str, Callable[..., object]],
    names: Mapping[str, object],
    persistent: Callable[[object], object],
) -> object:
    """Return a pickle's value, with a Global or a Record for every name that is not in the tables.

    Sets become lists, and frozensets tuples. calls maps the names that may be called to functions. names maps names
    that are only mentioned to values. persistent maps a persistent id to its object. source names the pickle in errors.
    Raises NpgptError for an instruction that no checkpoint needs, and for a pickle that is malformed or too long.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[object, Any] = {}

    def taken(op: pickletools.OpcodeInfo) -> list[Any]:
        """Pop an instruction's operands from the stack, as pickletools lists them, but none below the last mark."""
        if pickletools.markobject in op.stack_before:
            if not marks:
                raise ValueError("there is no mark")
            start = marks.pop() - op.stack_before.index(pickletools.markobject)
        else:  # pickletools lists no operand for PUT, which leaves it on the stack
            start = len(stack) - (1 if "PUT" in op.name else len(op.stack_before))
        if start < (marks[-1] if marks else 0):
            raise ValueError("the stack is empty")
        operands = stack[start:]
        del stack[start:]
        return operands

    def called(function: object, arguments: object) -> object:
        """Return the result of a call in the table, or a Record of any other. Raises ValueError for a non-function."""
        if not isinstance(function, Global | Record) or not isinstance(arguments, tuple):
            raise ValueError("it calls a value that is not a function")
        if isinstance(function, Record) or function.name not in calls:
            return Record(function.name, arguments)
        if len(arguments) > MOST_ARGUMENTS:
            raise ValueError(f"{function.name} is called with {len(arguments)} arguments")
        return calls[function.name](*arguments)

    def mentioned(name: str) -> object:
        """Return a name's value in names, or a Global, which may be callable or not."""
        return names[name] if name in names else Global(name)

    def outcome(op: pickletools.OpcodeInfo, argument: Any) -> object:
        """Return the value that an instruction pushes onto the stack, after popping its operands."""
        match op.name:
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" | "FROZENSET":
                return tuple(taken(op))
            case "EMPTY_LIST" | "LIST" | "EMPTY_SET":
                return taken(op)
            case "APPEND" | "APPENDS" | "ADDITEMS":
                target, *items = taken(op)
                _contents(target, list).extend(items)
                return target
            case "EMPTY_DICT" | "DICT" | "SETITEM" | "SETITEMS":
                target, *items = taken(op) if op.name.startswith("SET") else ({}, *taken(op))
                pairs = _contents(target, dict)
                if len(items) % 2:
                    raise ValueError("dictionary items must be pairs")
                for key, value in zip(items[::2], items[1::2], strict=True):
                    pairs[_key(key)] = value
                return target
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                place = len(memo) if op.name == "MEMOIZE" else argument
                if not 0 <= place < 2**32:
                    raise ValueError(f"the memo index {place!r:.40} is out of range")
                (memo[place],) = taken(op)
                return memo[place]
            case "GET" | "BINGET" | "LONG_BINGET":
                return memo[argument]
            case "GLOBAL":
                return mentioned(argument.replace(" ", ".", 1))
            case "STACK_GLOBAL":
                module, name = taken(op)
                if not isinstance(module, str) or not isinstance(name, str):
                    raise ValueError("a global's name is not a string")
                return mentioned(f"{module}.{name}")
            case "EXT1" | "EXT2" | "EXT4":  # a code in the extension registry of the program that wrote it
                return Global(f"{op.name} {argument}")
            case "BINPERSID":
                return persistent(*taken(op))
            case "REDUCE" | "NEWOBJ":
                return called(*taken(op))
            case "NEWOBJ_EX":
                kind, arguments, keywords = taken(op)
                made = called(kind, arguments)
                if isinstance(made, Record):
                    made.state = keywords
                elif keywords:
                    raise ValueError("it calls a function with keyword arguments")
                return made
            case "INST":
                return called(Global(argument.replace(" ", ".", 1)), tuple(taken(op)))
            case "OBJ":
                kind, *arguments = taken(op)
                return called(kind, tuple(arguments))
            case "BUILD":
                target, state = taken(op)
                if isinstance(target, Record):
                    target.state = state
                elif type(target) is not dict:  # npgpt ignores _metadata, an attribute of state dicts
                    raise ValueError("it sets attributes of a value that has none")
                return target
        raise ValueError(f"no checkpoint needs the instruction {op.name}")

    try:
        for steps, (op, argument, _) in enumerate(pickletools.genops(program)):
            if op.name == "STOP":
                return taken(op)[0]
            if steps > MOST_STEPS:
                raise ValueError(f"it has more than {MOST_STEPS} instructions")
            if op.name == "MARK":
                marks.append(len(stack))
            elif op.name in CONSTANTS:
                stack.append(CONSTANTS[op.name])
            elif op.name in VALUES:
                if isinstance(argument, int) and abs(argument) >= LARGEST:
                    raise ValueError("a number has more than 256 bits")
                stack.append(argument)
            elif op.name not in ("PROTO", "FRAME"):  # which have no effect
                stack.append(outcome(op, argument))
    except NpgptError:
        raise
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise NpgptError(f"{source} is malformed: {str(error)!r:.200}") from None
    raise NpgptError(f"{source} is malformed: it ends without STOP")


def _contents(target: object, kind: type[list[Any]] | type[dict[Any, Any]]) -> Any:
    """Return the list or dict that receives items: the target itself, or a record's contents.

    Raises ValueError for any other target.
    """
    if isinstance(target, Record):
        if target.contents is None:
            target.contents = kind()
        target = target.contents
    if type(target) is not kind:
        raise ValueError(f"it adds {kind.__name__} items to another type")
    return target


def _key(key: object) -> object:
    """Return a key, wrapped in a Record, which hashes by identity, if an attacker could choose its hash.

    Raises ValueError for an unhashable key.
    """
    if isinstance(key, list | dict):
        raise ValueError("a key is a list or a dictionary")
    plain = isinstance(key, PLAIN) and not (isinstance(key, int) and abs(key) >= LARGEST_KEY)
    return key if plain or isinstance(key, Record) else Record("a key", (key,))
