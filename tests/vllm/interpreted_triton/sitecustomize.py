"""Let vLLM's V2 model runner start without a GPU: its Triton kernels run interpreted, on NumPy.

For processes that have this folder in PYTHONPATH. vLLM takes Triton for usable if there is one
active driver; the interpreter then needs none.
"""

import os
from importlib import import_module

os.environ["TRITON_INTERPRET"] = "1"
backends = import_module("triton.backends").backends


class InterpretedDriver:
    @staticmethod
    def is_active() -> bool:
        return True


class InterpretedBackend:
    driver = InterpretedDriver


backends.clear()
backends["cpu"] = InterpretedBackend
