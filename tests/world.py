from benchmarks.world import *  # noqa
from benchmarks.world import _work  # noqa
