"""Pickles are never executed: a small interpreter rebuilds plain values and calls nothing but what it is handed.

A pickle is a program for a stack machine; pickletools, which only disassembles, splits it into instructions. Python's
own machine imports and calls whatever a pickle names, which is how a checkpoint can run its author's code. Here a
global is only a name that is looked up in a table when it is called, and any other name is refused.
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
    SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8""".split()
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
OPAQUE = object()  # a value that nothing is made of


@dataclass(frozen=True)
class Global:
    """A name that a pickle would have imported, such as torch._utils._rebuild_tensor_v2."""

    name: str


def read(
    program: bytes,
    source: str,
    calls: Mapping[str, Callable[..., object]],
    names: Mapping[str, object],
    persistent: Callable[[object], object],
) -> object:
    """Return a pickle's value, made of Python's dictionaries, lists, tuples, numbers and text and what calls return.

    calls maps names that may be called to functions, names maps names that may only be mentioned to values, and
    persistent turns a persistent id into its object. source names the pickle in errors. Raises NpgptError for a name in
    neither table, an instruction that no checkpoint needs, and a program that is malformed or too long.
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

    def mentioned(name: str) -> object:
        """Return a global's value in names, or the global itself where it may be called."""
        if name not in calls and name not in names:
            raise NpgptError(
                f"{source} asks for {name:.200}, which npgpt does not run: only tensors and plain values are read; "
                "save the bare weights with torch.save(model.state_dict(), …)"
            )
        return names[name] if name in names else Global(name)

    def outcome(op: pickletools.OpcodeInfo, argument: Any) -> object:
        """Return what an instruction puts on the stack, having taken its operands from there."""
        match op.name:
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                return tuple(taken(op))
            case "EMPTY_LIST" | "LIST":
                return taken(op)
            case "APPEND" | "APPENDS":
                target, *items = taken(op)
                if type(target) is not list:
                    raise ValueError("items belong into a list")
                target.extend(items)
                return target
            case "EMPTY_DICT" | "DICT" | "SETITEM" | "SETITEMS":
                target, *items = taken(op) if op.name.startswith("SET") else ({}, *taken(op))
                if type(target) is not dict or len(items) % 2:
                    raise ValueError("items belong into a dictionary, in pairs")
                for key, value in zip(items[::2], items[1::2], strict=True):
                    if not isinstance(key, PLAIN) or (isinstance(key, int) and abs(key) >= LARGEST_KEY):
                        raise ValueError("a key is neither text nor a number of usual size")
                    target[key] = value
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
            case "INST":
                mentioned(argument.replace(" ", ".", 1))
                raise ValueError("INST makes an instance of a class")
            case "STACK_GLOBAL":
                module, name = taken(op)
                if not isinstance(module, str) or not isinstance(name, str):
                    raise ValueError("a global's name is no text")
                return mentioned(f"{module}.{name}")
            case "BINPERSID":
                return persistent(*taken(op))
            case "REDUCE":
                function, arguments = taken(op)
                if not isinstance(function, Global) or not isinstance(arguments, tuple):
                    raise ValueError("what is called is no function")
                if len(arguments) > MOST_ARGUMENTS:
                    raise ValueError(f"{function.name} is called with {len(arguments)} arguments")
                return calls[function.name](*arguments)
            case "BUILD":
                target, _ = taken(op)  # attributes, such as a state dict's _metadata: nothing that npgpt needs
                if type(target) is not dict and target is not OPAQUE:
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
