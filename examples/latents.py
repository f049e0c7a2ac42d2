"""A flow in the latent space of an autoencoder: data are encoded once, latents are coupled, samples are decoded.

    python examples/latents.py      # scikit-learn's digits as 16 numbers each; half a minute

With a VAE of diffusers, ``encode`` is ``vae.encode(x).latent_dist.sample() * vae.config.scaling_factor``.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import flows
import mbot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/latents"))
    args = parser.parse_args()
    steps = 50 if args.quick else 2000
    torch.manual_seed(0)
    digits = flows.datasets.digits()
    images, labels = digits.rows(torch.arange(len(digits)))
    encode = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 16))
    decode = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 64), nn.Unflatten(1, (1, 8, 8)))
    optimizer = torch.optim.Adam([*encode.parameters(), *decode.parameters()], lr=2e-3)
    for _ in range(steps):
        x = images[torch.randint(len(images), (128,))]
        error = (decode(encode(x)) - x).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    print(f"the autoencoder leaves {float(error.detach() / images.var()):.1%} of the variance")

    with torch.no_grad():
        latents = encode(images)
    centre, scale = latents.mean(0), latents.std(0)  # latents like the noise: mean 0, deviation 1
    data = TensorDataset((latents - centre) / scale, labels)
    model = flows.models.ResidualMLP(16, num_classes=10)
    loader = flows.CoupledLoader(data, None, mbot.ConditionalOTCoupling(), batch_size=64, ot_batch_size=640)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    trainer = flows.Trainer(model, loader, steps=steps, optimizer=optimizer, ema=0.99, progress=False)
    trainer.fit()

    y = torch.arange(500) % 10
    flow = flows.integrate(trainer.sampling_model.eval(), torch.randn(500, 16), y=y, method="heun", steps=5)
    with torch.no_grad():
        samples = decode(flow.final * scale + centre)
    nearest = torch.cdist(samples.flatten(1), images.flatten(1)).argmin(1)
    right = float((labels[nearest] == y).float().mean())
    print(f"{flow.nfe} calls of the flow; the nearest image has the class of {right:.1%} of the samples")
    flows.datasets.save_grid(samples[:100], args.out / "latents.png", scale=4)


if __name__ == "__main__":
    main()
