"""Time what `import luxtorch` adds to `import torch`: the median of some fresh processes, in seconds.

The processes find bytecode, as they do in an installed package; without it compiling the sources adds about 0.1 s.
"""

import os
import statistics
import subprocess
import sys
import tempfile

CODE = "import time, torch; start = time.perf_counter(); import luxtorch; print(time.perf_counter() - start)"


def seconds(environment: dict[str, str]) -> float:
    """Return what one fresh process takes."""
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=environment)
    return float(run.stdout)


with tempfile.TemporaryDirectory() as bytecode:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = bytecode
    seconds(environment)  # writes the bytecode
    times = [seconds(environment) for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 9)]
print(f"import luxtorch adds {statistics.median(times):.3f} s (median of {len(times)}, least {min(times):.3f})")
