"""``agentrun gateway``, in a process that ends with the run and may break a promise:
``python -m tests.chaos.gateway <mutant or nothing> <arguments of agentrun>``.
"""

from __future__ import annotations

import sys

from agentrun.cli import main
from tests.chaos.mutants import break_promise
from tests.chaos.process import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    if sys.argv[1]:
        break_promise(sys.argv[1])
    del sys.argv[1]
    main()
