"""What a removal may learn again from the suspect's answers to images without the trigger.

They hold clean behaviour where nobody has clean data, and two things in them hold the backdoor as well. The small
probabilities tell how near an image is to the trigger: I-BAU that was held to all answers saw a smooth trigger fall
from 99 to 17 % within four rounds and come back to 57 in the next eight. And an answer that one variation of an image
gets and another does not is often one of those that the trigger would get. Both can be left out, or what is learned
again can weigh less.

The last is what `Robust` does by default. What I-BAU left, with all answers or with sharpened ones (a temperature of
0.5, only trusted answers, two public images a sample), by the weight of distillation:

                                                                        all, 80   all, 20   sharp, 80   sharp, 20
    small CNN, eleven attacks (seeds 100 and 101), SMI's samples         10.6 %     6.5 %       3.2 %       3.0 %
        accuracy there                                                   96.4 %    96.2 %      96.3 %      96.1 %
    small CNN, SIG and smooth (seeds 102 to 107), clean samples            16 %       8 %        13 %         8 %
    plain CNN, a patch, reconstructions, mean of three removals            12 %       8 %        26 %        32 %

With all answers the lower weight is better on both architectures; sharpened ones are better on one alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.augment import vary
from smi.compute import Runner, frozen, predict
from smi.defenses.base import ask
from smi.domains.base import PublicImages


class TrustedAnswers:
    """Distance to the suspect's answers to varied samples and public images, where they are to be trusted.

    An answer is trusted where its label is that of the image as it is; for a sample, the label that it comes with.
    Variations are those of `smi.augment.vary`, afresh each step. temperature: of the answers, in [0, 1]. At 1 they are
    the suspect's probabilities, below 1 the small ones shrink, and the distance is ``KL(answers ‖ repaired)``; at 0
    they are labels, and it is the cross-entropy. only_trusted: False holds every answer. public: images that the
    suspect has `recognised`, ``per_sample`` of them a sample, or None.
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
        self._images = None if public is None else public.images
        self._labels: Tensor | None = None
        if public is not None and (only_trusted or not temperature):
            self._labels = predict(self._suspect, public.images).argmax(1)

    def __call__(self, run: Runner, images: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss on ``images`` ``[N, C, H, W]`` with ``labels`` ``[N]``, and public images."""
        if self._images is not None:
            count = round(self._per_sample * len(images))
            extra = torch.randint(len(self._images), (count,), generator=self._rng)
            images = torch.cat([images, self._images[extra].to(images.device)])
            if self._labels is not None:
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
