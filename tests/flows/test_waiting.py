import os
import re
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("command", "given", "spins"),
    [
        (["-m", "flows"], None, False),
        (["-m", "flows"], "active", True),
        (["-c", "import flows, torch"], None, True),
    ],
)
def test_threads_sleep_on_the_command_line_unless_the_user_chose(command, given, spins):
    own = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment |= {"OMP_DISPLAY_ENV": "verbose"} | ({} if given is None else {"OMP_WAIT_POLICY": given})
    run = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    rounds = re.findall(r"GOMP_SPINCOUNT = '(\w+)'", run.stdout + run.stderr)
    if not rounds:
        pytest.skip("torch's OpenMP library does not show its settings")
    assert any(count != "0" for count in rounds) == spins
