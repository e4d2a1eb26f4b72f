"""Program to run in the sandbox: judges another program by tests that it never sees; see `code`.

Two processes. The grader holds the tests and evaluates them; the program's functions are remote calls to a host
process, whose values come back as plain data (numbers, text, lists ...), all else as handles. So a program cannot
patch what compares, bring an `__eq__`, print a verdict, or end into success: it can only answer calls. The grader is
not dumpable, so that a process of the same user sees neither its memory nor its descriptors.
"""

import builtins
import ctypes
import json
import math
import os
import re
import subprocess
import sys
import traceback
from decimal import Decimal
from fractions import Fraction
from types import ModuleType
from typing import Any, NoReturn

LONGEST_MESSAGE = 16 << 20  # characters
_SMALL = 1 << 63  # JSON's whole numbers may be slow or refused beyond
_PR_SET_DUMPABLE = 4
_CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
# They would end a loop of a test early and so pass it.
_NOT_RAISED = ("StopIteration", "StopAsyncIteration")


def encode(value: Any, keep: Any) -> Any:
    """As JSON: `[type, parts...]` for all but None, truth values, text and ordinary numbers. `keep` gives the handle of
    a value that is no plain data."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        whole = int.__index__(value)
        return whole if -_SMALL < whole < _SMALL else ["int", hex(whole)]
    if isinstance(value, float):
        number = float.__float__(value)
        return number if math.isfinite(number) else ["float", repr(number)]
    for container, kind in _CONTAINERS.items():
        if isinstance(value, kind):
            return [container, *(encode(item, keep) for item in kind.__iter__(value))]
    if isinstance(value, dict):
        return ["dict", *([encode(k, keep), encode(v, keep)] for k, v in dict.items(value))]
    if isinstance(value, complex | Decimal | Fraction):
        return [type(value).__name__, str(value)]
    if isinstance(value, bytes | bytearray):
        return [type(value).__name__, value.hex()]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    name = getattr(value, "__name__", None) if isinstance(value, type | type(len)) else None
    if isinstance(name, str) and getattr(builtins, name, None) is value:
        return ["builtin", name]
    return ["handle", keep(value)]


def decode(data: Any, find: Any) -> Any:
    """The value; `find` gives what a handle stands for. Raises for what `encode` never writes."""
    if not isinstance(data, list):
        return data
    kind, *parts = data
    if kind in _CONTAINERS:
        return _CONTAINERS[kind]([decode(part, find) for part in parts])
    if kind == "dict":
        return {decode(key, find): decode(value, find) for key, value in parts}
    if kind == "int":
        return int(parts[0], 16)
    if kind in ("bytes", "bytearray"):
        data = bytes.fromhex(parts[0])
        return data if kind == "bytes" else bytearray(data)
    if kind == "builtin":
        return getattr(builtins, parts[0])
    if kind == "handle":
        return find(parts[0])
    types = {"float": float, "complex": complex, "Decimal": Decimal, "Fraction": Fraction, "range": range}
    return types[kind](*parts)


# ---- the program's side -------------------------------------------------------------------------------------


def host(receive: int, send: int) -> None:
    """Executes programs and calls their functions, as it is told."""
    module = ModuleType("program")
    sys.modules["program"] = module  # where dataclasses and pickle look
    kept: list[Any] = []

    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    def perform(action: str, target: Any, arguments: list[Any], named: dict[str, Any]) -> Any:
        if action == "execute":
            exec(compile(target, "program", "exec"), module.__dict__)
        elif action == "name":
            if target not in module.__dict__:
                raise NameError(f"name {target!r} is not defined")
            return module.__dict__[target]
        elif action == "call":
            return target(*arguments, **named)
        else:
            return getattr(builtins, action)(target, *arguments)  # getattr, setattr, list, len

    with os.fdopen(receive) as requests, os.fdopen(send, "w") as answers:
        for line in requests:
            action, target, arguments, named = (decode(part, kept.__getitem__) for part in json.loads(line))
            try:
                value = perform(action, target, arguments, named)
                answer = {"value": encode(value, keep), "arguments": encode(arguments, keep)}
            except BaseException as error:
                answer = {"raised": type(error).__name__, "message": str(error)[:1000]}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


# ---- the grader's side --------------------------------------------------------------------------------------


class ProgramError(RuntimeError):
    """What the program raised, where it is no ordinary exception."""


class Program:
    """The host process and what it is asked."""

    def __init__(self) -> None:
        receive, answers = os.pipe()
        requests, send = os.pipe()
        command = [sys.executable, "-s", "-B", __file__, str(requests), str(answers)]
        none = subprocess.DEVNULL
        subprocess.Popen(command, stdin=none, stdout=none, stderr=none, pass_fds=(requests, answers))
        os.close(requests)
        os.close(answers)
        self._answers, self._requests = os.fdopen(receive), os.fdopen(send, "w")

    def ask(self, action: str, target: Any, *arguments: Any, **named: Any) -> Any:
        """Raises what the program raised."""
        request = [action, target, list(arguments), named]
        print(json.dumps([encode(part, _handle) for part in request]), file=self._requests, flush=True)
        line = self._answers.readline(LONGEST_MESSAGE)
        if not line.endswith("\n"):
            _end(3, "the program ended" if not line else "the program's value is too long")
        answer = json.loads(line)
        if "raised" in answer:
            raise _exception(answer["raised"], str(answer["message"]))
        for given, changed in zip(arguments, self._decode(answer["arguments"]), strict=True):
            _copy_changes(given, changed)
        return self._decode(answer["value"])

    def _decode(self, data: Any) -> Any:
        return decode(data, lambda number: Remote(self, int(number)))


class Remote:
    """A value that lives in the program. It equals itself only: the program's `__eq__` is never asked."""

    def __init__(self, program: Program, number: int) -> None:
        self.__dict__.update(_program=program, _number=number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._program.ask("call", self, *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._program.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.ask("setattr", self, name, value)

    def __iter__(self) -> Any:
        return iter(self._program.ask("list", self))

    def __len__(self) -> int:
        return int(self._program.ask("len", self))

    def __bool__(self) -> bool:
        return True


def _handle(value: Any) -> int:
    if isinstance(value, Remote):
        return int(value.__dict__["_number"])
    raise TypeError(f"a test gives the program a {type(value).__name__}, which cannot be sent")


def _exception(name: str, message: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and name not in _NOT_RAISED:
        try:
            return kind(message)
        except TypeError:  # one that takes more than a message
            pass
    return ProgramError(f"{name}: {message}")


def _copy_changes(given: Any, changed: Any) -> None:
    """A function may change its arguments in place."""
    if type(given) is not type(changed):
        return
    if isinstance(given, list | bytearray):
        given[:] = changed
    elif isinstance(given, dict | set):
        given.clear()
        given.update(changed)


class Names(dict[str, Any]):
    """Globals of the tests: what they define, the standard library's modules, and then the program's names."""

    def __init__(self, program: Program, tests: list[str]) -> None:
        super().__init__(__name__="tests")
        self._program = program
        # `math` in `math.isclose(f(1), 2)`; a program's function may have the name of a module (`numbers(3)`).
        self._modules = {name for test in tests for name in re.findall(r"(?<![\w.])(\w+)\.\w", test)}

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)  # Python then takes the built-in one, not the program's
        if name in sys.stdlib_module_names and name in self._modules:
            return __import__(name)
        return self._program.ask("name", name)


def grade(task: dict[str, Any], verdict: Any) -> None:
    """Writes to `verdict`, after every test, how many the program passes."""
    program = Program()
    for part in task["program"]:
        program.ask("execute", part)
    names = Names(program, [task["setup"], *task["tests"]])
    exec(compile(task["setup"], "setup", "exec"), names)
    if task["entry_point"]:
        names[task["entry_point"]] = program.ask("name", task["entry_point"])
    passed = 0
    for k, test in enumerate(task["tests"]):
        try:
            exec(compile(test, f"test {k}", "exec"), names)
            passed += 1
            print(json.dumps({"passed": passed}), file=verdict, flush=True)
        except Exception:
            traceback.print_exc(limit=-2)
            if not task["partial"]:
                break


def _end(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    os._exit(code)


def main() -> None:
    if len(sys.argv) > 1:
        host(int(sys.argv[1]), int(sys.argv[2]))
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    task = json.load(sys.stdin)
    verdict = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what tests print is no verdict
    grade(task, verdict)
    os._exit(0)


if __name__ == "__main__":
    main()
