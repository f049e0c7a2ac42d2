"""What the settings of ``image_completion.py`` were chosen by: candidates on validation images.

python examples/image_completion_choices.py --data-root DATA    # DATA/mnist/*.gz; 4 minutes
python examples/image_completion_choices.py                     # scikit-learn's digits
"""

from __future__ import annotations

from statistics import mean
from typing import Any

from common import arguments, save, table
from image_completion import CHOICES, LOCAL, ONE, PUBLISHED, SETTINGS, Test, load, run

CANDIDATES: dict[str, list[dict[str, Any]]] = {  # what may be otherwise; Deep Sets takes over what one slot chose
    LOCAL: [{}, {"sharpness": 4.0}, {"slots": 0.5}, {"mass": False}, {"block": False, "steps": 1.5}],
    PUBLISHED: [{}, {"skip": False}],
    ONE: [{}, {"skip": False}],
}


def main() -> None:
    parser = arguments(__doc__, "image_completion_choices")
    parser.add_argument("--data", choices=tuple(SETTINGS), help="default: mnist with --data-root, else digits")
    args = parser.parse_args()
    args.data = args.data or ("digits" if args.data_root is None else "mnist")
    args.out.mkdir(parents=True, exist_ok=True)
    setting, parts = SETTINGS[args.data], load(args.data, args.data_root)
    args.steps = 20 if args.quick else setting.steps // 3
    test = Test(parts["validation"], 300, setting.shown, 1)
    inside = [i for i, size in enumerate(setting.shown) if setting.contexts[0] <= size <= setting.contexts[1]]
    rows, figures = [], []
    for kind, candidates in CANDIDATES.items():
        for changed in candidates:
            choice = CHOICES[kind]._replace(**changed)
            facts, _ = run(kind, choice, parts, test, setting, args, 100 + args.seed)
            score = mean(facts["unseen"][i] for i in inside)
            says = ", ".join(f"{k} {v}" for k, v in changed.items())
            rows.append([kind, says or "as chosen", f"{score:.3f}", f"{facts['seconds']:.0f}"])
            print(*rows[-1], flush=True)
            figures.append({"model": kind, "changed": changed, "score": score, **facts})
    page = (
        f"# Image completion, choices on validation images: {args.data}\n\nMean NLL of unseen pixels over contexts of "
        f"{', '.join(str(setting.shown[i]) for i in inside)} pixels, 300 validation images, seed {100 + args.seed}, "
        "a third of the steps of the table of test images; differences of 0.02 are within what seeds do. *Steps*, "
        "*slots*: for each of the setting. Deep Sets takes over what one slot chose.\n\n"
        f"{table(['model', 'changed', 'NLL', 'CPU s'], rows)}\n"
    )
    save(f"image_completion_{args.data}_choices", args, page, {"runs": figures})


if __name__ == "__main__":
    main()
