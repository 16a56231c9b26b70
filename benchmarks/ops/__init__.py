"""What run_ops.py is made of: the ops and their peers, timing, result files, README's tables."""

from ops.matmul import MATMUL
from ops.optimizer import OPTIMIZER
from ops.table import ELEMENTWISE

OPS = ELEMENTWISE | OPTIMIZER | MATMUL
GROUPS = {"all": OPS, "elementwise": ELEMENTWISE, "optimizer": OPTIMIZER, "matmul": MATMUL}
