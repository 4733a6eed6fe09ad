"""Makes an animation from a video that `--capture-video` saved.

    flags="--env-id LunarLanderContinuous-v3 --total-timesteps 300000 --capture-video"
    python sppo_continuous.py $flags
    python docs/animation.py runs/<run>/299008.mp4 docs/figures/lunar_lander.gif

A run that is complete plays again, and saves the video, with `--resume runs/<run> --capture-video`.
"""

from dataclasses import dataclass
from pathlib import Path

import imageio
import numpy as np
import tyro
from PIL import Image


@dataclass
class Args:
    """From a video to a GIF that loops."""

    video: tyro.conf.Positional[Path]  # a file of --capture-video
    output: tyro.conf.Positional[Path]  # the GIF
    every: int = 3  # keep each n-th frame
    width: int = 360  # pixels
    colours: int = 32  # fewer are smaller
    fps: float = 17.0  # of the frames that are kept; LunarLander moves at 50 steps per second
    hold: float = 1.0  # seconds that the last frame stays


def main(args: Args) -> None:
    frames = [np.asarray(frame) for frame in imageio.get_reader(args.video).iter_data()]
    kept = frames[:: args.every] + frames[-1:] * round(args.hold * args.fps)
    size = args.width, round(args.width * frames[0].shape[0] / frames[0].shape[1])
    small = [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in kept]
    palette = small[len(small) // 2].quantize(args.colours)  # one for all frames: nothing flickers
    images = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in small]
    duration = round(100 / args.fps) * 10  # GIFs count in hundredths of a second
    images[0].save(
        args.output,
        save_all=True,
        append_images=images[1:],
        duration=duration,
        loop=0,
        optimize=True,
    )
    print(f"{args.output}: {len(images)} frames, {args.output.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main(tyro.cli(Args))
