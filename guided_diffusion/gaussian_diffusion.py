"""The diffusion of a mask: what the network predicts, its training losses, and its denoiser.

A :class:`GaussianDiffusion` holds no loop and no model: :meth:`~GaussianDiffusion.training_losses`
computes the losses of a network at given timesteps, and :meth:`~GaussianDiffusion.denoiser` turns a
network and a condition into the one function that every sampler needs, ``denoise(x, level) ->
Prediction``. The image is the condition and is never noised. Ho et al. (2020); learned variance:
Nichol & Dhariwal (2021), section 3.1; v-prediction: Salimans & Ho (2022); loss weights: Hang et al.
(2023); cross-entropy on the clean mask: Chen et al. (2022).

Where the noisy mask is withheld from the network, which trains it as a plain segmentation network
too, the network is given zeros at the last trained timestep: :meth:`~GaussianDiffusion.direct`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guided_diffusion.losses import (
    COARSE_LOSSES,
    discretized_gaussian_log_likelihood,
    mask_cross_entropy,
    mask_probability,
    normal_kl,
    soft_dice_loss,
)
from guided_diffusion.schedule import NoiseLevel, NoiseSchedule, per_sample

Losses = Callable[..., dict[str, Tensor]]
"""A function with the arguments and result of :meth:`GaussianDiffusion.training_losses`."""
Network = Callable[[Tensor, Tensor, Any, Tensor | None], Any]
"""``net(x, t, condition, y)`` returns ``.raw`` [B, K or 2K, H, W] and ``.coarse``."""


class Prediction(NamedTuple):
    """The result of a denoiser for a noisy mask.

    Attributes:
        x0: the clean mask [B, K, H, W], clipped as the denoiser was asked to.
        var_frac: the learned variance as a fraction between its two bounds, [B, K, H, W]; 0 and 1
            are the bounds, but it is not clamped. None if the variance is not learned.
        coarse: the condition network's own mask [B, 1, H, W] in (0, 1), or None; samplers ignore
            it.
    """

    x0: Tensor
    var_frac: Tensor | None = None
    coarse: Tensor | None = None


Denoiser = Callable[[Tensor, NoiseLevel], Prediction]
"""``denoise(x, level)`` predicts the clean mask from a noisy mask [B, K, H, W]."""


@dataclass(frozen=True)
class GaussianDiffusion:
    """The diffusion of a mask under a schedule.

    Attributes:
        schedule: the noise levels of training.
        timesteps: the trained timesteps, increasing; None for all of the schedule.
        predict_xstart: the network predicts the clean mask instead of the noise.
        learn_sigma: the network's last K channels give the variance between its bounds.
        use_kl: the loss is the variational bound.
        rescale_learned_sigmas: scale the bound's part of the hybrid loss by T / 1000.
        rescale_timesteps: the network is conditioned on ``t * 1000 / T``.
        mask_range: the values of background and foreground in a diffused mask.
        predict_v: the network predicts ``alpha * eps - sigma * x0`` instead of the noise.
        min_snr_gamma: weigh the squared error as if it were that of x0 times the signal-to-noise
            ratio, which is capped at this value; 0 for no weight.
        coarse_loss: the loss of the coarse mask, if the network has one: a name of
            :data:`guided_diffusion.losses.COARSE_LOSSES`.
        mask_loss: of the predicted clean mask: ``mse``, ``bce`` or ``dice_ce``; the last two need
            ``predict_xstart``, and the network predicts logits.
        mask_dropout: the share of training draws in which the noisy mask is withheld; 1 for a
            network that never sees one.
        noise_share: the share of training draws at the last timestep, besides those that fall
            there by chance.
        exclusive: the K classes exclude each other.
    """

    schedule: NoiseSchedule
    timesteps: tuple[int, ...] | None = None
    predict_xstart: bool = False
    learn_sigma: bool = False
    use_kl: bool = False
    rescale_learned_sigmas: bool = False
    rescale_timesteps: bool = False
    mask_range: tuple[float, float] = (0.0, 1.0)
    predict_v: bool = False
    min_snr_gamma: float = 0.0
    coarse_loss: str = "none"
    mask_loss: str = "mse"
    mask_dropout: float = 0.0
    noise_share: float = 0.0
    exclusive: bool = False

    def to_range(self, mask: Tensor) -> Tensor:
        """Map a mask in [0, 1] to the range that is diffused."""
        low, high = self.mask_range
        return low + (high - low) * mask

    def from_range(self, x0: Tensor) -> Tensor:
        """Map a denoised mask to [0, 1]: the inverse of :meth:`to_range`, then clamped."""
        low, high = self.mask_range
        return ((x0 - low) / (high - low)).clamp(0, 1)

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """The trained timesteps, increasing."""
        return self.timesteps or tuple(range(len(self.schedule)))

    @cached_property
    def _alpha_bar_prev(self) -> Tensor:
        """alpha_bar of the trained timestep before each one, 1 for the first: float64 [T]."""
        kept = torch.tensor(self.kept)
        previous = torch.full_like(self.schedule.alpha_bar, math.nan)
        previous[kept[0]] = 1.0
        previous[kept[1:]] = self.schedule.alpha_bar[kept[:-1]]
        return previous

    def denoiser(
        self,
        net: Network,
        condition: Any,
        clip: tuple[float, float] | None = (-1.0, 1.0),
        y: Tensor | None = None,
        *,
        direct: Tensor | None = None,
        guidance: float = 1.0,
    ) -> Denoiser:
        """Bind a network to a condition: the function that every sampler takes.

        Args:
            net: called as ``net(x, t, condition, y)``.
            condition: what the network's ``encode`` returned for the images of the batch.
            clip: the range that x0 is clamped to at every evaluation; None for no clamping.
            y: class labels int64 [B], for class-conditional networks.
            direct: the raw prediction without the noisy mask, from :meth:`direct`, for
                ``guidance``.
            guidance: how far the noisy mask is trusted: the raw prediction is ``direct +
                guidance * (given - direct)``, as in classifier-free guidance (Ho & Salimans, 2022)
                with the noisy mask in place of the class.
        """
        if guidance != 1 and direct is None:
            raise ValueError("guidance needs the prediction without the noisy mask")

        def denoise(x: Tensor, level: NoiseLevel) -> Prediction:
            t = torch.full((len(x),), self.scale_timestep(level.t), device=x.device)
            output = net(x, t, condition, y)
            raw = output.raw.to(x.dtype, copy=True)  # a CUDA graph's output is overwritten
            value, var_frac = self._split(raw, x)
            if direct is not None and guidance != 1:
                value = direct + guidance * (value - direct)
            if self.predict_xstart:
                x0 = self._clean(value)
            elif self.predict_v:
                x0 = level.alpha * x - level.sigma * value
            else:
                x0 = (1 / level.alpha) * x - (level.sigma / level.alpha) * value
            return Prediction(x0.clamp(*clip) if clip else x0, var_frac, output.coarse)

        return denoise

    @property
    def last(self) -> int:
        """The noisiest trained timestep."""
        return self.kept[-1]

    @property
    def predicts_logits(self) -> bool:
        """Whether the network predicts the logits of the clean mask."""
        return self.mask_loss != "mse"

    def direct(self, net: Network, condition: Any, like: Tensor) -> Tensor:
        """Evaluate a network without a noisy mask.

        Args:
            net: trained with ``mask_dropout``.
            condition: what the network's ``encode`` returned for the images of the batch.
            like: any tensor of the masks' shape [B, K, H, W], dtype and device.

        Returns:
            The raw prediction of the clean mask, or its logits, of the shape and dtype of ``like``.
        """
        t = torch.full((len(like),), self.scale_timestep(self.last), device=like.device)
        raw = net(torch.zeros_like(like), t, condition, None).raw.to(like.dtype, copy=True)
        return self._split(raw, like)[0]

    def soft_mask(self, raw: Tensor) -> Tensor:
        """Turn a raw prediction of the clean mask, [B, K, H, W], into a soft mask in [0, 1]."""
        return self.from_range(self._clean(raw))

    def _clean(self, raw: Tensor) -> Tensor:
        """The clean mask, in ``mask_range``, that a raw prediction of it means."""
        if not self.predicts_logits:
            return raw
        return self.to_range(mask_probability(raw, exclusive=self.exclusive))

    def training_losses(
        self,
        net: Network,
        x0: Tensor,
        t: Tensor,
        *,
        eps: Tensor,
        condition: Any,
        y: Tensor | None = None,
        withheld: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of a network on clean masks noised to timesteps ``t``.

        Args:
            net: called as ``net(x_t, t, condition, y)``.
            x0: clean masks [B, K, H, W] in ``mask_range``.
            t: int64 [B], trained timesteps; keep it on the CPU to avoid a device synchronisation.
            eps: standard normal noise of the shape of ``x0``.
            condition: what the network's ``encode`` returned for the images.
            y: class labels int64 [B], for class-conditional networks.
            withheld: bool [B], where the noisy mask is withheld from the network; keep it on the
                CPU as well. None for nowhere.

        Returns:
            One value per sample, each [B] and of the dtype of ``x0``: ``loss``; ``mse``, the
            unweighted mean squared error of the prediction (absent with ``use_kl`` and where logits
            are predicted); ``vb``, the variational bound in bits per element (with ``learn_sigma``
            or ``use_kl``); ``ce``, the cross-entropy in nats, of logits, and ``dice``, 1 - Dice,
            which ``dice_ce`` adds to the loss where the noisy mask tells nothing: where it is
            withheld, and at the last timestep. Elsewhere it would lead all masks to one. A network
            with a coarse mask adds its terms: ``coarse``, to be added to the objective without the
            weights of the timesteps, and its components.
        """
        x_t = self.schedule.add_noise(x0, t, eps)
        told = t
        if withheld is not None and bool(withheld.any()):
            told = torch.where(withheld, self.last, t)
            x_t = x_t.masked_fill(withheld.to(x0.device, non_blocking=True)[:, None, None, None], 0)
        scaled_t = told * self.scale_timestep(1.0) if self.rescale_timesteps else told
        output = net(x_t, scaled_t.to(x0.device, non_blocking=True), condition, y)
        terms = self._diffusion_terms(output.raw.to(x0.dtype), x0, x_t, told, eps)
        if output.coarse is None:
            return terms
        coarse, mask = output.coarse.to(x0.dtype), self.from_range(x0)
        there = t.to(x0.device, non_blocking=True)
        return terms | COARSE_LOSSES[self.coarse_loss](coarse, mask, there)

    def _diffusion_terms(
        self, raw: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, eps: Tensor
    ) -> dict[str, Tensor]:
        """Compute ``loss`` from the raw output, and its components among ``mse`` and ``vb``."""
        value, var_frac = self._split(raw, x0)

        if self.predicts_logits:
            return self._logit_terms(value, self.from_range(x0), t)

        if self.use_kl:
            vb = self._bound(value, var_frac, x0, x_t, t)
            return {"loss": vb * len(self.kept), "vb": vb}

        mse = _mean_per_sample((value - self._target(x0, t, eps)) ** 2)
        loss = mse
        if self.min_snr_gamma:
            loss = mse * self._weight(t).to(mse, non_blocking=True)
        if not self.learn_sigma:
            return {"loss": loss, "mse": mse}

        vb = self._bound(value.detach(), var_frac, x0, x_t, t)
        vb = vb * (len(self.kept) / 1000) if self.rescale_learned_sigmas else vb
        return {"loss": loss + vb, "mse": mse, "vb": vb}

    def _logit_terms(self, logits: Tensor, mask: Tensor, t: Tensor) -> dict[str, Tensor]:
        """The losses of predicted logits; Dice counts at the last timestep only."""
        entropy = mask_cross_entropy(logits, mask, exclusive=self.exclusive)
        if self.mask_loss == "bce":
            return {"loss": entropy, "ce": entropy}
        dice = soft_dice_loss(mask_probability(logits, exclusive=self.exclusive), mask)
        counts = (t == self.last).to(dice, non_blocking=True)
        return {"loss": entropy + counts * dice, "ce": entropy, "dice": dice}

    def _target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The target of the prediction; v is that of Salimans & Ho (2022), section 4."""
        if not self.predict_v:
            return x0 if self.predict_xstart else eps
        alpha_bar = self.schedule.alpha_bar[t.cpu()]
        return per_sample(alpha_bar.sqrt(), x0) * eps - per_sample((1 - alpha_bar).sqrt(), x0) * x0

    def _weight(self, t: Tensor) -> Tensor:
        """Weight of the squared error, float64 [B]: Hang et al. (2023), section 3.4.

        It is min(SNR, gamma) for predicted x0; the errors of eps and v are SNR and SNR + 1 times
        that of x0.
        """
        alpha_bar = self.schedule.alpha_bar[t.cpu()]
        snr = alpha_bar / (1 - alpha_bar)
        larger = 1.0 if self.predict_xstart else snr + 1 if self.predict_v else snr
        return snr.clamp(max=self.min_snr_gamma) / larger

    def scale_timestep(self, t: float) -> float:
        """Return the timestep that the network is conditioned on."""
        return t * 1000 / len(self.schedule) if self.rescale_timesteps else t

    def _split(self, raw: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split the raw output into the predicted value and the fraction of the variance."""
        channels = x.shape[1]
        expected = channels * (2 if self.learn_sigma else 1)
        if raw.shape[1] != expected:
            raise ValueError(f"the network returned {raw.shape[1]} channels instead of {expected}")
        return raw[:, :channels], (raw[:, channels:] + 1) / 2 if self.learn_sigma else None

    def _bound(
        self, value: Tensor, var_frac: Tensor | None, x0: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """One term of the variational bound per sample, in bits per element: Ho et al., eq. 5."""
        t = t.cpu()
        alpha_bar, previous = self.schedule.alpha_bar[t], self._alpha_bar_prev[t]
        beta = 1 - alpha_bar / previous
        clean_weight = per_sample(previous.sqrt() * beta / (1 - alpha_bar), x0)
        noisy_weight = per_sample((1 - previous) * (1 - beta).sqrt() / (1 - alpha_bar), x0)
        low, high = (per_sample(bound, x0) for bound in self._log_variance_bounds(t))

        if not self.predict_xstart:
            signal, noise = per_sample(alpha_bar.sqrt(), x0), per_sample((1 - alpha_bar).sqrt(), x0)
            by_v, by_eps = signal * x_t - noise * value, (x_t - noise * value) / signal
            value = by_v if self.predict_v else by_eps
        mean = clean_weight * value + noisy_weight * x_t
        log_var = high if var_frac is None else low + var_frac * (high - low)

        true_mean = clean_weight * x0 + noisy_weight * x_t
        kl = _mean_per_sample(normal_kl(true_mean, low, mean, log_var))
        nll = _mean_per_sample(-discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_var))
        first = (t == self.kept[0]).to(x0.device, non_blocking=True)
        return torch.where(first, nll, kl) / math.log(2)

    def _log_variance_bounds(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the posterior variance and of beta, float64 [B] each: Nichol & Dhariwal, eq. 15.

        The posterior variance of the first timestep is 0, so that of the second is used there, and
        also for its beta where the variance is fixed.
        """
        second = torch.tensor(self.kept[min(1, len(self.kept) - 1)])
        first = t == self.kept[0]
        alpha_bar, previous = self.schedule.alpha_bar, self._alpha_bar_prev
        beta = 1 - alpha_bar / previous
        posterior = beta * (1 - previous) / (1 - alpha_bar)
        low = posterior[torch.where(first, second, t)].log()
        high = beta[t].log()
        return low, high if self.learn_sigma else torch.where(first, low, high)


def _mean_per_sample(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)
