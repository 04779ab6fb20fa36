"""What a removal may learn again from the suspect's answers to images without the trigger.

They hold clean behaviour where nobody has clean data, and two things in them hold the backdoor as well. The small
probabilities tell how near an image is to the trigger: I-BAU that was held to all answers saw a smooth trigger fall
from 99 to 17 % within four rounds and come back to 57 in the next eight. And an answer that one variation of an image
gets and another does not is often one of those that the trigger would get. Both can be left out, and what is left need
not be held as firmly.

With SMI's samples, over eleven attacks on one small CNN (all but WaNet, development seeds 100 and 101), I-BAU that is
held to all answers with a weight of 80 ends at 96.4 % accuracy and 10.6 % attack success; with a temperature of 0.5,
only trusted answers and two public images a sample at 96.3 and 3.2; with a weight of 20 as well at 96.1 and 3.0. Of SIG
and smooth triggers in six further models, with clean samples, these three leave 16, 13 and 8 %. But of a patch in a
plain CNN they leave 12, 26 and 32 % (mean of three removals each), so that `Robust` holds all answers by default. All
answers with a weight of 20 leave 8 % there, 6.5 % of the eleven attacks at 96.2, and 8 % of SIG and smooth.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.augment import vary
from smi.compute import Runner, frozen, predict
from smi.defenses.base import ask, recognised
from smi.domains.base import PublicImages


class TrustedAnswers:
    """Distance to the suspect's answers to varied samples and public images, where they are to be trusted.

    An answer is trusted where its label is that of the image as it is; for a sample, the label that it comes with.
    Variations are those of `smi.augment.vary`, afresh each step. temperature: of the answers, in [0, 1]. At 1 they are
    the suspect's probabilities, below 1 the small ones shrink, and the distance is ``KL(answers ‖ repaired)``; at 0
    they are labels, and it is the cross-entropy. only_trusted: False holds every answer. per_sample: public images a
    sample; none where the suspect has not `recognised` them.
    """

    def __init__(
        self,
        model: nn.Module,
        public: PublicImages | None,
        rng: torch.Generator,
        *,
        temperature: float = 0.0,
        only_trusted: bool = True,
        per_sample: float = 1.0,
    ) -> None:
        self._suspect, self._rng = frozen(model), rng
        self._temperature, self._only_trusted, self._per_sample = temperature, only_trusted, per_sample
        public = recognised(self._suspect, public) if per_sample else None
        self._images = None if public is None else public.images
        self._labels = None if public is None else predict(self._suspect, public.images).argmax(1)

    def __call__(self, run: Runner, images: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss on ``images`` ``[N, C, H, W]`` with ``labels`` ``[N]``, and public images."""
        if self._images is not None and self._labels is not None:
            count = round(self._per_sample * len(images))
            extra = torch.randint(len(self._images), (count,), generator=self._rng)
            images = torch.cat([images, self._images[extra].to(images.device)])
            labels = torch.cat([labels, self._labels[extra].to(labels.device)])
        varied = vary(images, self._rng)
        logits = ask(self._suspect, varied)
        trusted = (logits.argmax(1) == labels).float() if self._only_trusted else torch.ones(len(varied)).to(logits)
        if self._temperature:
            answers = F.log_softmax(logits / self._temperature, 1)
            losses = F.kl_div(F.log_softmax(run(varied), 1), answers, reduction="none", log_target=True).sum(1)
        else:
            losses = F.cross_entropy(run(varied), labels, reduction="none")
        return (losses * trusted).sum() / trusted.sum().clamp(min=1)
