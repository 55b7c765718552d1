"""Pickles are never executed: a small interpreter rebuilds plain values and calls nothing but what it is handed.

A pickle is a program for a stack machine; pickletools, which only disassembles, splits it into instructions. Python's
own machine imports and calls whatever a pickle names, which is how a checkpoint can run its author's code. Here a
global is only a name. It is looked up in a table when it is called; a call of any other name leaves a Record of what
was to be called, which is data like the rest.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8""".split()
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


@dataclass(frozen=True, slots=True)
class Global:
    """A name that a pickle would have imported, such as torch._utils._rebuild_tensor_v2."""

    name: str


@dataclass(eq=False, repr=False, slots=True)
class Record:
    """A call that was not made: the name, the arguments, and what the pickle would have put into the outcome.

    state is what BUILD sets, mostly a dictionary of attributes; contents are the items of a subclass of list or dict.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    state: object = None
    contents: list[Any] | dict[Any, Any] | None = None

    def __repr__(self) -> str:
        """Return the name: all that is in it could be longer than memory."""
        return f"<{self.name:.80}>"


def refusal(source: str, name: str) -> NpgptError:
    """Return the error for what is made by a name that is not in the tables."""
    return NpgptError(
        f"{source} asks for {name:.200}, which npgpt does not run: only tensors and plain values are read; "
        "save the bare weights with torch.save(model.state_dict(), …)"
    )


def read(
    program: bytes,
    source: str,
    calls: Mapping[str, Callable[..., object]],
    names: Mapping[str, object],
    persistent: Callable[[object], object],
) -> object:
    """Return a pickle's value, made of Python's dictionaries, lists, tuples, numbers and text, of what calls return,
    and of a Global or Record for every name that is not in the tables. A set is a list here, a frozen one a tuple.

    calls maps names that may be called to functions, names maps names that may only be mentioned to values, and
    persistent turns a persistent id into its object. source names the pickle in errors. Raises NpgptError for an
    instruction that no checkpoint needs, and for a program that is malformed or too long.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[object, Any] = {}

    def taken(op: pickletools.OpcodeInfo) -> list[Any]:
        """Take an instruction's operands from the stack, as many as pickletools says, none from below the last mark."""
        if pickletools.markobject in op.stack_before:
            if not marks:
                raise ValueError("there is no mark")
            start = marks.pop() - op.stack_before.index(pickletools.markobject)
        else:  # PUT leaves its operand where it is, and so pickletools says that it has none
            start = len(stack) - (1 if "PUT" in op.name else len(op.stack_before))
        if start < (marks[-1] if marks else 0):
            raise ValueError("the stack is empty")
        operands = stack[start:]
        del stack[start:]
        return operands

    def called(function: object, arguments: object) -> object:
        """Return what a call in the table returns, or the record of any other. Raises ValueError for no call."""
        if not isinstance(function, Global | Record) or not isinstance(arguments, tuple):
            raise ValueError("what is called is no function")
        if isinstance(function, Record) or function.name not in calls:
            return Record(function.name, arguments)
        if len(arguments) > MOST_ARGUMENTS:
            raise ValueError(f"{function.name} is called with {len(arguments)} arguments")
        return calls[function.name](*arguments)

    def mentioned(name: str) -> object:
        """Return a global's value in names, or the global itself, whether it may be called or not."""
        return names[name] if name in names else Global(name)

    def outcome(op: pickletools.OpcodeInfo, argument: Any) -> object:
        """Return what an instruction puts on the stack, having taken its operands from there."""
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
                    raise ValueError("items belong into a dictionary, in pairs")
                for key, value in zip(items[::2], items[1::2], strict=True):
                    pairs[_key(key)] = value
                return target
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                place = len(memo) if op.name == "MEMOIZE" else argument
                if not 0 <= place < 2**32:
                    raise ValueError("a value is kept under a number that is none of pickle's own")
                (memo[place],) = taken(op)
                return memo[place]
            case "GET" | "BINGET" | "LONG_BINGET":
                return memo[argument]
            case "GLOBAL":
                return mentioned(argument.replace(" ", ".", 1))
            case "STACK_GLOBAL":
                module, name = taken(op)
                if not isinstance(module, str) or not isinstance(name, str):
                    raise ValueError("a global's name is no text")
                return mentioned(f"{module}.{name}")
            case "EXT1" | "EXT2" | "EXT4":  # a number in a registry of the program that wrote it
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
                    raise ValueError("a call with keywords")
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
                elif type(target) is not dict:  # a state dict's attribute _metadata is nothing that npgpt needs
                    raise ValueError("attributes of what has none")
                return target
        raise ValueError(f"the instruction {op.name} has no place in a checkpoint")

    try:
        for steps, (op, argument, _) in enumerate(pickletools.genops(program)):
            if op.name == "STOP":
                return taken(op)[0]
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
                stack.append(outcome(op, argument))
    except NpgptError:
        raise
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise NpgptError(f"{source} is malformed: {str(error)!r:.200}") from None
    raise NpgptError(f"{source} is malformed: it ends without an end")


def _contents(target: object, kind: type[list[Any]] | type[dict[Any, Any]]) -> Any:
    """Return the list or dictionary that items are put into: the target itself, or what a record holds.

    Raises ValueError for any other target.
    """
    if isinstance(target, Record):
        if target.contents is None:
            target.contents = kind()
        target = target.contents
    if type(target) is not kind:
        raise ValueError(f"items belong into a {'list' if kind is list else 'dictionary, in pairs'}")
    return target


def _key(key: object) -> object:
    """Return a key, with a record, which has no hash but its identity, for one whose hash somebody could choose.

    Raises ValueError for what cannot be a key.
    """
    if isinstance(key, list | dict):
        raise ValueError("a key is a list or a dictionary")
    plain = isinstance(key, PLAIN) and not (isinstance(key, int) and abs(key) >= LARGEST_KEY)
    return key if plain or isinstance(key, Record) else Record("a key", (key,))
