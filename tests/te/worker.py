"""tests/layouts/worker.py with Transformer Engine's layers on CPU."""

from __future__ import annotations

from tests.te.install import install

if __name__ == "__main__":
    install()
    from tests.layouts.worker import main

    main()
