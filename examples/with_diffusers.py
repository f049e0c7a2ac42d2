"""A U-Net of diffusers as a velocity model: trained with conditional OT, saved, loaded in diffusers again, guided.

Needs diffusers (``pip install diffusers``). Handwritten digits; latents of an autoencoder are data like these.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from diffusers import UNet2DModel

import flows
import mbot


def velocity(unet: UNet2DModel) -> flows.models.WrappedModel:
    """``model(t, x, y)``: the last class of the U-Net stands for no condition."""
    last = unet.config.num_class_embeds - 1
    return flows.models.wrap(unet, "x, t, class_labels=y", output="sample", time_scale=1000, null_class=last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    steps = 20 if parser.parse_args().quick else 1500
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, num_class_embeds=11,
    )  # fmt: skip
    coupling = mbot.ConditionalOTCoupling()
    loader = flows.CoupledLoader(flows.datasets.digits(), None, coupling, batch_size=64, ot_batch_size=320)
    losses: list[float] = []
    trainer = flows.Trainer(
        velocity(unet), loader, steps=steps, ema=0.99, condition_dropout=0.1, progress=False, log_every=steps // 10,
        optimizer=torch.optim.Adam(unet.parameters(), lr=5e-4), on_log=lambda row: losses.append(row["loss"]),
    )  # fmt: skip
    trainer.fit()
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")

    with tempfile.TemporaryDirectory() as folder:
        trainer.sampling_model.module.save_pretrained(folder)  # the averaged weights, a model of diffusers
        print("saved as", ", ".join(sorted(path.name for path in Path(folder).iterdir())))
        loaded = velocity(UNet2DModel.from_pretrained(folder)).eval()
    y = torch.arange(20) % 10
    noise, t = torch.randn(20, 1, 8, 8), torch.rand(20)
    print("loaded as it was:", torch.equal(loaded(t, noise, y), trainer.sampling_model.eval()(t, noise, y)))
    samples = flows.integrate(flows.GuidedModel(loaded, 2.0), noise, y=y, method="heun", steps=10).final
    print("guided samples", tuple(samples.shape), "within", [round(float(v), 2) for v in samples.aminmax()])


if __name__ == "__main__":
    main()
