"""A run's model extrapolated by several alphas, on the rows that the run held out.

    python benchmarks/expo_curve.py --config=dpo_smollm2 --strong=runs/dpo_smollm2 \\
        --run-dir=runs/expo_smollm2 --alphas=0,0.5,1,2,4

The weak side is the config's `model.path`. Both are loaded once and extrapolated on the mesh. For
each alpha: preference accuracy and margin, with the weak side as the reference, and how many
sampled answers follow their rule; as a table, `curve.json` and `curve.svg` in the run directory.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from alignjax import config as configs

TERMS = {"rewards/accuracies": "held-out accuracy", "rewards/margins": "held-out margin"}
RULE = "answers that follow the rule"


@dataclass(frozen=True)
class Curve:
    strong: str = ""  # the trained run, or a model
    alphas: str = "0,0.5,1,2,4"  # from -1, the weak side


def main() -> None:
    options, config = configs.parse_with(Curve(), "alignjax.train")
    from alignjax.extrapolation.alphas import typed
    from alignjax.run import load_shown, planned
    from alignjax.sharding import use_mesh
    from alignjax.weights.fetch import open_model

    use_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tensor)
    run = planned(config)
    weak = load_shown(run.source)
    strong = load_shown(open_model(options.strong, configs.cache_dir(config), "--strong"))
    rows = []
    for number, (text, alpha) in enumerate(typed(options.alphas).items()):
        rows.append({"alpha": text} | measure(run, strong, weak, alpha, number))
        print(json.dumps(rows[-1]), flush=True)
    directory = Path(run.directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "curve.json").write_text(json.dumps(rows, indent=2))
    (directory / "curve.svg").write_text(figure(rows))
    print(table(rows))


def measure(run, strong, weak, alpha: float, number: int) -> dict[str, float]:
    """What one alpha gives on the run's held-out rows; answers are kept as those of a step."""
    import jax
    import numpy as np

    from alignjax import evaluation, reference, samples
    from alignjax.extrapolation.mesh import extrapolate

    config = run.config
    score = (run.held_out, config.batch.row_length, run.rows, config.compute)
    weights = reference.fingerprint(weak)
    ref = reference.reference_logps(weak, weights, *score, configs.cache_dir(config))
    theta = jax.jit(extrapolate)(strong, weak, np.float32(alpha))
    logps = evaluation.score(theta, *score)
    terms = evaluation.item_terms(run.stage, logps, ref, run.held_out)
    found = {TERMS[name]: float(terms[name][0].mean()) for name in TERMS}
    answers = samples.sample(run, theta, number, weights)
    ruled = [one["follows"] for one in answers if "rule" in one]
    return found | ({RULE: sum(ruled) / len(ruled)} if ruled else {})


def table(rows: list[dict]) -> str:
    """As Markdown, with a row for each alpha."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    for row in rows:
        cells = [row["alpha"], *(_said(name, row[name]) for name in names[1:])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _said(name: str, value: float) -> str:
    return f"{value:.4f}" if "margin" in name else f"{value:.1%}"


def figure(rows: list[dict], width: int = 220, height: int = 120, edge: int = 34) -> str:
    """A panel for each number over alpha, as SVG."""
    xs = [float(row["alpha"]) for row in rows]
    parts = []
    for panel, name in enumerate(list(rows[0])[1:]):
        left, values = panel * (width + 2 * edge) + edge, [row[name] for row in rows]
        points = [
            (left + width * _place(x, xs), edge + height * (1 - _place(y, values)))
            for x, y in zip(xs, values, strict=True)
        ]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<text x="{left}" y="{edge - 14}">{name}</text>')
        parts.append(
            f'<rect x="{left}" y="{edge}" width="{width}" height="{height}" fill="none" '
            'stroke="#bbb"/>'
        )
        parts.append(f'<polyline points="{line}" fill="none" stroke="#1f77b4"/>')
        for (x, y), row in zip(points, rows, strict=True):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="#1f77b4"/>')
            parts.append(
                f'<text x="{x:.1f}" y="{edge + height + 13}" text-anchor="middle">'
                f"{row['alpha']}</text>"
            )
        for value, y in ((max(values), edge + 4), (min(values), edge + height)):
            parts.append(
                f'<text x="{left - 3}" y="{y}" text-anchor="end">{_said(name, value)}</text>'
            )
    size = len(rows[0]) - 1
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size * (width + 2 * edge)}" '
        f'height="{height + 2 * edge}" font-family="sans-serif" font-size="10">\n'
        '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _place(value: float, values: list[float]) -> float:
    """Where a value lies between the least and the largest, from 0 to 1."""
    low, high = min(values), max(values)
    return (value - low) / (high - low) if high > low else 0.5


if __name__ == "__main__":
    main()
