"""Whether counterfactual birds end nearer to the redrawn bird when they start from a repainted one (O).

A decoder of Mirror-CFE is asked to cross the classifier's boundary, and what crosses it need not look like the other
class. A painter is asked for looks alone (`finecf.explainers.Repainter`): it learns to mend real birds, sees no pair of
bird and redrawn bird, and no gradient of the classifier. Mirror-CFE's change comes on top, and of it what suffices
(`finecf.explainers.trim`) is kept: what keeps a tenth of its lead and stands a blur, as of `explain(..., trim=True)`;
and what is just called the target, as a first counterfactual image is (`trim=JUST_ACROSS`).

    python benchmarks/mirror_repaint.py --images 500 [--rounds N] [--validation]
    python benchmarks/mirror_repaint.py --painter FILE    # of `finecf train repainter`, instead of the shipped one

Columns are those of `benchmarks/mirror.py`; "stand a blur" is a share of those found. All birds are graded, found or
not; one that has no first or no trimmed image stands there as the image of k = 1.
"""

from __future__ import annotations

import torch
from mirror import birds_options, chosen_images, kept, logits_of, nearer, publish, redrawn_birds
from torch import Tensor

import finecf
from finecf.explainers import JUST_ACROSS, Repainter, trim
from finecf.explainers.repaint import ROUNDS
from finecf.metrics import redraw_distances
from finecf.metrics.bootstrap import paired_bootstrap
from finecf.metrics.tables import Table
from finecf.training import mirror_classifier, mirror_recipe, shipped_decoder, shipped_painter


def main() -> None:
    options = birds_options(__doc__, files=("painter",), rounds=ROUNDS)
    classifier = mirror_classifier("birds")
    numbers, x, target = chosen_images("birds", classifier, mirror_recipe("birds").pairs, options)
    birds, items, _ = redrawn_birds(numbers, target, options)
    repainter = Repainter(classifier, options.painter or shipped_painter("birds"), rounds=options.rounds)
    mirror = finecf.MirrorCFE(classifier, shipped_decoder("birds"), repainter=repainter, progress=True)
    found = mirror.explain(x, target, steps=[0.0, 1.0], trim=True)
    ends = torch.stack([each.mirror_image for each in found])
    painted = torch.stack([each.repainted_image for each in found])
    # As MirrorCFE has it: from the repainted image, where that and the change lead to the target.
    further = (painted + ends - x).clamp(0, 1)
    upon = logits_of(classifier, further).argmax(1) == target
    starts, farther = (torch.where(upon[:, None, None, None], *each) for each in ((painted, x), (further, ends)))
    rows = {
        "first": torch.stack([each.counterfactual for each in found]),
        "trimmed": trim(classifier, x, ends, target).images,
        "just across": trim(classifier, x, ends, target, **JUST_ACROSS).images,
        "repainted": painted,
        "repainted, and trimmed": torch.stack(
            [each.mirror_image if each.trimmed_image is None else each.trimmed_image for each in found]
        ),
        "repainted, and just across": trim(classifier, starts, farther, target, **JUST_ACROSS).images,
    }
    table = Table(f"birds: {len(x)} held-out images, repainted up to {options.rounds} times", [])
    inside: dict[str, Tensor] = {}
    for name, images in rows.items():
        scores = redraw_distances(birds, items, x, images, target)
        seen = scores.graded
        reached = logits_of(classifier, images).argmax(1) == target
        inside[name] = scores.inside[seen]
        table.rows[name] = {
            "found": float(reached.double().mean()),
            "L1": float((images - x).abs().mean()),
            "birds": int(seen.sum()),
            "times their area": float(scores.energy[seen].mean() / scores.area[seen].mean()),
            **nearer(scores, seen),
            "stand a blur": kept(classifier, images[reached], target[reached], 1.0),
        }
    table.columns = list(table.rows["trimmed"])
    table.notes += [
        f"{int(upon.sum())} of {len(x)} are trimmed on top of the repainted bird, the others from the bird itself.",
        "Inside, outside: negative is closer to the redrawn bird than the bird itself is.",
        *(
            f"Repainted, and {name}, inside, minus {name} alone: "
            f"{paired_bootstrap(inside[f'repainted, and {name}'], inside[name])}."
            for name in ("trimmed", "just across")
        ),
    ]
    publish([table], options.markdown)


if __name__ == "__main__":
    main()
