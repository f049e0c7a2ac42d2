"""Peak memory of the grid loss at CIFAR size: k = 16, m = 128, d = 3072."""

import resource
import subprocess
import sys

from harness import write

K, M, D = 16, 128, 3072


def run(scheme):
    import torch

    import mbot

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(K, M, D, generator=generator).requires_grad_()
    y = torch.randn(K, M, D, generator=generator).requires_grad_()
    small = mbot.BoMbOT(mbot.ExactOT(), num_batches=2, batch_size=4)
    small.from_batches(x[:2, :4], y[:2, :4]).backward()  # imports and kernels
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kind = {"BoMbOT": mbot.BoMbOT, "MiniBatchOT": mbot.MiniBatchOT}.get(scheme)
    if kind is not None:
        kind(mbot.ExactOT(), num_batches=K, batch_size=M).from_batches(x, y).backward()
    else:
        sys.path.insert(0, str(__import__("pathlib").Path(__file__).parent))
        from mbot_losses import loop

        loop(x, y).backward()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(before / 2**20, after / 2**20)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1])
    else:
        rows = []
        for scheme in ("BoMbOT", "MiniBatchOT", "loop over ot.emd"):
            out = subprocess.run([sys.executable, __file__, scheme], capture_output=True, text=True, check=True).stdout
            before, after = map(float, out.split())
            rows.append({"loss": scheme, "before, GiB": before, "peak, GiB": after, "its own, GiB": after - before})
        write(
            "mbot_memory",
            "Peak memory of the grid loss",
            {f"k = {K}, m = {M}, d = {D}, forward and backward, float32": rows},
            "Peak resident memory of a fresh process: before (with torch, compiled kernels and the points) and after.",
        )
