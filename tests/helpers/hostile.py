"""Programs that want out of the sandbox, or to pass without being right; see test_sandbox.py."""

SOLVE = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return 0\n"

# Each prints `escaped` where it reached what it must not. SECRET stands for a file of the parent, PARENT for its
# process, PORT for a port that it listens on, MARK for a path that must not come to be.
ESCAPES = {
    "read a file": "print('escaped', open('SECRET').read())",
    "read it through proc": "print('escaped', open('/proc/1/root' + 'SECRET').read())",
    "read it through a link": "import os\nos.symlink('SECRET', 'link')\nprint('escaped', open('link').read())",
    "read passwords": "print('escaped', open('/etc/shadow').read(9))",
    "write a file": "open('MARK', 'w').write('x')\nprint('written')",
    "write to the system": "import sys\nopen(sys.prefix + '/MARKED', 'w')\nprint('escaped')",
    "remount": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "if libc.mount(b'none', b'/usr', b'tmpfs', 0, b'') == 0 or libc.mount(None, b'/', None, 32, b'') == 0:\n"
        "    print('escaped')"
    ),
    "new user namespace": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nif libc.unshare(0x10000000) == 0:\n    print('escaped')\n"
        "if libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0) >= 0:\n    print('escaped')"
    ),
    "environment": "import os\nif 'CANARY' in str(os.environ):\n    print('escaped')",
    "environment of others": (
        "import glob\nfor name in glob.glob('/proc/*/environ'):\n    try:\n"
        "        if b'CANARY' in open(name, 'rb').read():\n            print('escaped')\n"
        "    except OSError:\n        pass"
    ),
    "memory of process 1": "open('/proc/1/mem', 'rb')\nprint('escaped')",
    "descriptors of process 1": "import os\nprint('escaped', os.listdir('/proc/1/fd'))",
    "inherited descriptors": (
        "import os\nfor number in range(3, 256):\n    try:\n        os.fstat(number)\n    except OSError:\n"
        "        continue\n    if number > 3 or 'proc' not in os.readlink(f'/proc/self/fd/{number}'):\n"
        "        print('escaped', number)"
    ),
    "see other processes": (
        "import os\nif sum(name.isdigit() for name in os.listdir('/proc')) > 2:\n    print('escaped')"
    ),
    "kill the parent": (
        "import os, signal\nfor pid in (PARENT, os.getppid(), 1, -1, 0):\n    try:\n"
        "        os.kill(pid, signal.SIGKILL if pid > 0 else signal.SIGTERM)\n    except OSError:\n        pass"
    ),
    "trace": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nif libc.ptrace(16, 1, 0, 0) == 0 or libc.ptrace(0, 0, 0, 0) == 0:\n"
        "    print('escaped')"
    ),
    "connect to the parent": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 2)\nprint('escaped')",
    "connect out": (
        "import socket\nfor family in (socket.AF_INET, socket.AF_INET6, socket.AF_PACKET, socket.AF_NETLINK, 40):\n"
        "    try:\n        socket.socket(family, socket.SOCK_DGRAM)\n        print('escaped', family)\n"
        "    except OSError:\n        pass"
    ),
    "abstract socket": (
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0mp_test_PORT')\nprint('escaped')"
    ),
    "become root": "import os\nos.setuid(0)\nprint('escaped')",
    "change its root": "import os\nos.chroot('/tmp')\nprint('escaped')",
    "device": "import os\nos.mknod('disk', 0o60666, os.makedev(254, 0))\nprint('escaped')",
    "kernel": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "if any(libc.syscall(n, 0, 0, 0, 0) >= 0 for n in (321, 298, 425, 323, 319, 29, 250)):\n    print('escaped')"
    ),
    "write its input": ("import os\nfd = os.open('/proc/self/fd/0', os.O_RDWR)\nos.write(fd, b'x')\nprint('escaped')"),
}

# What must end at a limit, and how the run must be called.
BOMBS = {
    "endless loop": ("while True: pass", "timeout"),
    "sleeper": ("import time\ntime.sleep(1000)", "timeout"),
    "ignores signals": (
        "import signal\nfor n in range(1, 32):\n    if n not in (9, 19):\n        signal.signal(n, signal.SIG_IGN)\n"
        "while True: pass",
        "timeout",
    ),
    "fork bomb": (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        "timeout",
    ),
    "threads": (
        "import threading, time\nwhile True:\n    try:\n"
        "        threading.Thread(target=time.sleep, args=(1000,)).start()\n    except RuntimeError:\n        pass",
        "timeout",
    ),
    "one large block": ("x = bytearray(10 ** 10)", "memory"),
    "many processes' memory": (
        "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n"
        "        x = bytearray(os.urandom(1)) * (150 << 20)\n"
        "        time.sleep(100)\ntime.sleep(100)",
        "memory",
    ),
    "endless output": ("while True: print('x' * 1000)", "output"),
    "endless errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "output"),
    "huge file": (
        "with open('big', 'wb') as file:\n    while True: file.write(bytes(1 << 20))",
        "error",
    ),
    "many files": (
        "k = 0\nwhile True:\n    k += 1\n    open(f'f{k}', 'wb').write(bytes(1 << 20))",
        "error",
    ),
    "deep recursion": ("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): return f()\nf()", "error"),
}

# Programs that define no right `add`, and want the tests to say that they do.
CHEATS = {
    "exit with success": "import sys\nsys.exit(0)",
    "exit at once": "import os\nos._exit(0)",
    "exit in the function": "import os\ndef add(a, b):\n    os._exit(0)",
    "exit by exception": "def add(a, b):\n    raise SystemExit(0)",
    "equal to all": (
        "class Any:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "    def __bool__(self): return True\ndef add(a, b):\n    return Any()"
    ),
    "a number equal to all": (
        "class Any(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
        "def add(a, b):\n    return Any(0)"
    ),
    "a list equal to all": (
        "class Any(list):\n    def __eq__(self, other): return True\ndef add(a, b):\n    return Any([0])"
    ),
    "print the verdict": (
        "import sys, os\nfor stream in (sys.stdout, sys.stderr, sys.__stdout__):\n"
        "    print('{\"passed\": 3}', file=stream, flush=True)\nfor number in range(1, 20):\n    try:\n"
        "        os.write(number, b'{\"passed\": 3}\\n')\n    except OSError:\n        pass\n" + WRONG
    ),
    "write into the grader": (
        "import os, glob\nfor name in glob.glob('/proc/[0-9]*/fd/[0-9]*') + glob.glob('/proc/[0-9]*/mem'):\n    try:\n"
        "        with open(name, 'w') as file:\n            file.write('{\"passed\": 3}\\n')\n"
        "    except (OSError, ValueError):\n        pass\n" + WRONG
    ),
    "patch built-ins": (
        "import builtins\nbuiltins.sum = builtins.abs = builtins.sorted = lambda *a, **k: 0\n"
        "builtins.AssertionError = None\nbuiltins.isinstance = lambda *a: True\n" + WRONG
    ),
    "patch the grader's file": (
        "import glob\nfor name in glob.glob('/tmp/*.py'):\n"
        "    open(name, 'w').write('print(\\'{\"passed\": 3}\\')')\n" + WRONG
    ),
    "patch modules of the process": (
        "import sys, json\nmain = sys.modules['__main__']\nmain.encode = lambda value, keep: True\n"
        "main.grade = lambda *a: None\n" + WRONG
    ),
    "answer with the wire's own words": "def add(a, b):\n    return ['builtin', 'exit']",
    "stop the tests' loop": "def add(a, b):\n    raise StopIteration",
    "kill the grader": (
        "import os, signal\nfor pid in range(1, 50):\n    for number in (signal.SIGTERM, signal.SIGKILL):\n"
        "        try:\n            os.kill(pid, number) if pid != os.getpid() else None\n        except OSError:\n"
        "            pass\n" + WRONG
    ),
    "define what the tests use": (
        "def all(x): return True\ndef map(*a): return []\ndef set(x): return 0\n"
        "class math:\n    isclose = staticmethod(lambda *a, **k: True)\n" + WRONG
    ),
    "look for the tests": (
        "import gc, sys, glob\nfound = [x for x in gc.get_objects() if isinstance(x, str) and 'assert' in x]\n"
        "text = ''.join(open(n).read() for n in glob.glob('/tmp/*')) + sys.stdin.read() + str(sys.argv) + str(found)\n"
        "def add(a, b):\n    return 5 if 'add(2, 3)' in text else 0"
    ),
}
