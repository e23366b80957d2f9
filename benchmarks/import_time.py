"""Time what `import luxtorch` adds to `import torch`: the median of some fresh processes, in seconds."""

import statistics
import subprocess
import sys

CODE = "import time, torch; start = time.perf_counter(); import luxtorch; print(time.perf_counter() - start)"


def seconds() -> float:
    """Return what one fresh process takes."""
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    return float(run.stdout)


times = [seconds() for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 9)]
print(f"import luxtorch adds {statistics.median(times):.3f} s (median of {len(times)}, least {min(times):.3f})")
