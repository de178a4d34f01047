"""Dynamic ReLU between its passes over the input: from the means to the coefficients, from the logits to the attention.

The tensors are small and the time goes into launches. Coefficients and attention take one launch each, forward and
backward, with a program for a sample or a part of it; another launch computes the gradients of all parameters.
Everything is computed in fp32. The passes over the input exchange partial sums with these kernels. Layers so large that
each sample should not read them anew are left to cuBLAS.
"""
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiling import Space, cdiv, planned, power_of_2
from ..triton_tiles import Launch, expm1, launch
from .mlp import mlp, mlp_backward
from .settings import DyReLUParams, DyReLUSettings

__all__ = ['attention', 'attention_backward', 'coefficients', 'coefficients_backward']

# Numbers that a program may read for a sample: the weights of both layers, which come out of the L2 cache, or partial
# sums. With more of them, launches of their own, which occupy a whole GPU, are faster.
_FEW = 64 * 1024
# Elements that a program computes with at once, and the warps that share them.
_TILE = 8192
_WARPS = 8
# The sides of the tiles of the gradients of weights.
_SIDE = 16
# The registers of a thread of the kernels that compute whole layers. Without a limit, ptxas chooses a lower one for the
# sake of an occupancy that these kernels, of few programs, do not have, and spills. Triton for AMD has no such option.
_REGISTERS = dict(maxnreg=128) if torch.version.hip is None else {}


@triton.jit
def _tanh_half(z):
    """Compute tanh(z / 2) without cancellation near 0."""
    t = expm1(-tl.abs(z))
    magnitude = -t / (2 + t)
    # Written so that NaN stays.
    return tl.where(z < 0, -magnitude, magnitude)


@triton.jit
def _column_sums(ptr, rows, columns, at, BLOCK_R: tl.constexpr):
    """Add up the columns ``at`` of a matrix."""
    sums = tl.zeros([BLOCK_R, at.shape[0]], tl.float32)
    for first in range(0, rows, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & (at < columns)[None, :]
        sums += tl.load(ptr + row[:, None] * columns + at[None, :], mask, 0.0)
    return tl.sum(sums, 0)


@triton.jit
def _tile(ptr, rows, columns, row, column):
    """Load a tile of a matrix, in fp32."""
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(ptr + row[:, None] * columns + column[None, :], mask, 0.0).to(tl.float32)


@triton.jit
def _pick(k, values, COEFS: tl.constexpr):
    """Pick ``values[k]``, element by element."""
    picked = tl.zeros(k.shape, tl.float32)
    for i in tl.static_range(COEFS):
        picked = tl.where(k == i, values[i], picked)
    return picked


@triton.jit
def _store_coefficients(z, n, o, out, residual_ptr, theta_ptr, start, scale, COEFS: tl.constexpr):
    """Store the coefficients for the outputs ``o`` of the second layer, which has the 2K of each channel in turn."""
    residual = _tanh_half(z)
    k = o % COEFS
    theta = _pick(k, start, COEFS) + _pick(k, scale, COEFS) * residual
    sample = n.to(tl.int64) * out
    tl.store(residual_ptr + sample + o, residual, o < out)
    tl.store(theta_ptr + sample + k * (out // COEFS) + o // COEFS, theta, o < out)


@triton.jit
def _store_dz(dtheta_ptr, rows, n, o, out, residual_ptr, dz_ptr, scale, COEFS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Store the gradients of the outputs ``o`` of the second layer, and return them."""
    sample = n.to(tl.int64) * out
    dtheta = _column_sums(dtheta_ptr + sample * rows, rows, out, o, BLOCK_R)
    residual = tl.load(residual_ptr + sample + o, o < out, 0.0)
    dz = dtheta * _pick(o % COEFS, scale, COEFS) * (1 - residual * residual) * 0.5
    tl.store(dz_ptr + sample + o, dz, o < out)
    return dz


@triton.jit
def _coefficients_kernel(
        parts_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr,
        mean_ptr, hidden_ptr, residual_ptr, theta_ptr, rows, channels, hidden, out, blocks, start, scale,
        COEFS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
):
    # The programs of a sample share its outputs. Each needs all hidden units; that all of them store these is harmless.
    n = tl.program_id(0) // blocks
    o = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    h = tl.arange(0, BLOCK_H)
    sample = n.to(tl.int64)
    units = tl.load(fc1_bias_ptr + h, h < hidden, 0.0).to(tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mean = _column_sums(parts_ptr + sample * rows * channels, rows, channels, c, BLOCK_R)
        tl.store(mean_ptr + sample * channels + c, mean, c < channels)
        units += tl.sum(_tile(fc1_weight_ptr, hidden, channels, h, c) * mean[None, :], 1)
    # NaN stays, except beyond the last unit, where it comes from 0 * inf.
    units = tl.where((units <= 0) | (h >= hidden), 0.0, units)
    tl.store(hidden_ptr + sample * hidden + h, units, h < hidden)
    z = tl.sum(_tile(fc2_weight_ptr, out, hidden, o, h) * units[None, :], 1)
    z += tl.load(fc2_bias_ptr + o, o < out, 0.0).to(tl.float32)
    _store_coefficients(z, n, o, out, residual_ptr, theta_ptr, start, scale, COEFS)


@triton.jit
def _coefficients_backward_kernel(
        dtheta_ptr, residual_ptr, hidden_ptr, fc1_weight_ptr, fc2_weight_ptr, dz_ptr, dhidden_ptr, dmean_ptr,
        rows, channels, hidden, out, scale,
        COEFS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
):
    n = tl.program_id(0)
    h = tl.arange(0, BLOCK_H)
    sample = n.to(tl.int64)
    dhidden = tl.zeros([BLOCK_H], tl.float32)
    for first in range(0, out, BLOCK_O):
        o = first + tl.arange(0, BLOCK_O)
        dz = _store_dz(dtheta_ptr, rows, n, o, out, residual_ptr, dz_ptr, scale, COEFS, BLOCK_R)
        dhidden += tl.sum(_tile(fc2_weight_ptr, out, hidden, o, h) * dz[:, None], 0)
    units = tl.load(hidden_ptr + sample * hidden + h, h < hidden, 0.0)
    dhidden = tl.where(units <= 0, 0.0, dhidden)
    tl.store(dhidden_ptr + sample * hidden + h, dhidden, h < hidden)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        dmean = tl.sum(_tile(fc1_weight_ptr, hidden, channels, h, c) * dhidden[:, None], 0)
        tl.store(dmean_ptr + sample * channels + c, dmean, c < channels)


@triton.jit
def _layer_gradients(
        tile, dout_ptr, in_ptr, dweight_ptr, dbias_ptr, batch, outs, ins,
        BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):
    """Store a tile of the gradient of a layer's weight and, in the tiles of the first inputs, that of its bias."""
    blocks = tl.cdiv(ins, BLOCK_I)
    o = tile // blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    dweight = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    dbias = tl.zeros([BLOCK_O], tl.float32)
    for first in range(0, batch, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        dout = _tile(dout_ptr, batch, outs, n, o)
        dweight += tl.sum(dout[:, :, None] * _tile(in_ptr, batch, ins, n, i)[:, None, :], 0)
        dbias += tl.sum(dout, 0)
    mask = (o < outs)[:, None] & (i < ins)[None, :]
    tl.store(dweight_ptr + o[:, None] * ins + i[None, :], dweight.to(dweight_ptr.dtype.element_ty), mask)
    if tile % blocks == 0:
        tl.store(dbias_ptr + o, dbias.to(dbias_ptr.dtype.element_ty), o < outs)


@triton.jit
def _parameters_backward_kernel(
        mean_ptr, hidden_ptr, dhidden_ptr, dz_ptr, dfc1_weight_ptr, dfc1_bias_ptr, dfc2_weight_ptr, dfc2_bias_ptr,
        batch, channels, hidden, out, tiles,
        BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):
    tile = tl.program_id(0)
    if tile < tiles:
        _layer_gradients(
            tile, dhidden_ptr, mean_ptr, dfc1_weight_ptr, dfc1_bias_ptr, batch, hidden, channels,
            BLOCK_N, BLOCK_O, BLOCK_I)
    else:
        _layer_gradients(
            tile - tiles, dz_ptr, hidden_ptr, dfc2_weight_ptr, dfc2_bias_ptr, batch, out, hidden,
            BLOCK_N, BLOCK_O, BLOCK_I)


@triton.jit
def _head_kernel(
        residual_ptr, theta_ptr, out, blocks, start, scale, COEFS: tl.constexpr, BLOCK_O: tl.constexpr,
):
    """Do what follows the second layer. The residuals replace its outputs."""
    n = tl.program_id(0) // blocks
    o = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    z = tl.load(residual_ptr + n.to(tl.int64) * out + o, o < out, 0.0)
    _store_coefficients(z, n, o, out, residual_ptr, theta_ptr, start, scale, COEFS)


@triton.jit
def _head_backward_kernel(
        dtheta_ptr, residual_ptr, dz_ptr, rows, out, blocks, scale,
        COEFS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
):
    n = tl.program_id(0) // blocks
    o = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    _store_dz(dtheta_ptr, rows, n, o, out, residual_ptr, dz_ptr, scale, COEFS, BLOCK_R)


@triton.jit
def _logits(logits_ptr, bias, p, positions, tau):
    return tl.where(p < positions, (tl.load(logits_ptr + p, p < positions, 0.0) + bias) / tau, float('-inf'))


@triton.jit
def _attention_kernel(logits_ptr, bias_ptr, pi_ptr, positions, tau, divisor, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64) * positions
    logits_ptr += sample
    bias = tl.load(bias_ptr).to(tl.float32)
    top = tl.full([BLOCK], float('-inf'), tl.float32)
    for first in range(0, positions, BLOCK):
        top = tl.maximum(top, _logits(logits_ptr, bias, first + tl.arange(0, BLOCK), positions, tau))
    top = tl.max(top, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, positions, BLOCK):
        total += tl.exp(_logits(logits_ptr, bias, first + tl.arange(0, BLOCK), positions, tau) - top)
    # Divisions that round correctly: where the attention is uniform, it is exactly 1.
    mean = tl.div_rn(tl.sum(total, 0), positions * 1.0)
    for first in range(0, positions, BLOCK):
        p = first + tl.arange(0, BLOCK)
        share = tl.div_rn(tl.exp(_logits(logits_ptr, bias, p, positions, tau) - top), mean)
        tl.store(logits_ptr + p, share, p < positions)
        tl.store(pi_ptr + sample + p, tl.where(share > 3, 3.0, share) / divisor, p < positions)


@triton.jit
def _attention_backward_kernel(dpi_ptr, share_ptr, positions, tau, divisor, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64) * positions
    dpi_ptr += sample
    share_ptr += sample
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, positions, BLOCK):
        p = first + tl.arange(0, BLOCK)
        share = tl.load(share_ptr + p, p < positions, 0.0)
        dpi = tl.load(dpi_ptr + p, p < positions, 0.0)
        total += tl.where(share <= 3, dpi, 0.0) * share
    mean = tl.sum(total, 0) / positions
    for first in range(0, positions, BLOCK):
        p = first + tl.arange(0, BLOCK)
        share = tl.load(share_ptr + p, p < positions, 0.0)
        dpi = tl.load(dpi_ptr + p, p < positions, 0.0)
        dlogits = share * (tl.where(share <= 3, dpi, 0.0) - mean) / (divisor * tau)
        tl.store(dpi_ptr + p, dlogits, p < positions)


def _block(size: int, other: int = 1) -> int:
    """Choose the side of a tile along a dimension of some size, where the other side is ``other``."""
    return min(power_of_2(size), max(_TILE // other, 1))


def _row_options(t: Tensor) -> dict[str, int]:
    """Choose how a program goes through the positions of a sample of shape (1, *spatial).

    Where they are many, it has as many warps as a program can have.
    """
    positions = math.prod(t.shape[1:])
    block = min(power_of_2(positions), 2 * _TILE)
    return dict(positions=positions, BLOCK=block, num_warps=_WARPS if block <= _TILE else 4 * _WARPS)


def _are_few(fc1_weight: Tensor, fc2_weight: Tensor) -> bool:
    return fc1_weight.numel() + fc2_weight.numel() <= _FEW


def _are_many(rows: int, columns: int) -> bool:
    """Tell whether so many partial sums are added up by a launch of its own, which leaves one row of them."""
    return rows * columns > _FEW


class _Coefficients(NamedTuple):
    """What is planned of the way from the means to the coefficients.

    Attributes:
        reduced: Whether the summands of the means are added up first.
        theta: The coefficients.
        mean: The means, None where the layers are left to PyTorch.
        hidden: The hidden units, likewise.
        residual: The residuals, likewise.
        run: The kernel: all of it, or what follows the layers.
    """
    reduced: bool
    theta: Space
    mean: Space | None
    hidden: Space | None
    residual: Space | None
    run: Launch


@planned
def _plan_coefficients(
        parts: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor,
        starts: tuple[float, ...], ranges: tuple[float, ...],
) -> _Coefficients:
    n, rows, channels = parts.shape
    hidden, out = fc1_weight.shape[0], fc2_weight.shape[0]
    coefs = len(starts)
    # In memory with the channels last
    theta = Space((n, out // coefs, coefs), (out, 1, out // coefs), torch.float32)
    if not _are_few(fc1_weight, fc2_weight):
        block_o = min(_block(out), 1024)
        blocks = cdiv(out, block_o)
        run = Launch(
            _head_kernel, n * blocks, out=out, blocks=blocks, start=starts, scale=ranges, COEFS=coefs, BLOCK_O=block_o)
        return _Coefficients(rows > 1, theta, None, None, None, run)
    reduced = _are_many(rows, channels)
    rows = 1 if reduced else rows
    block_h = _block(hidden)
    block_c, block_o = _block(channels, block_h), _block(out, block_h)
    blocks = cdiv(out, block_o)
    run = Launch(
        _coefficients_kernel, n * blocks,
        rows=rows, channels=channels, hidden=hidden, out=out, blocks=blocks, start=starts, scale=ranges,
        COEFS=coefs, BLOCK_R=_block(rows, block_c), BLOCK_C=block_c, BLOCK_H=block_h, BLOCK_O=block_o,
        num_warps=_WARPS, **_REGISTERS,
    )
    return _Coefficients(reduced, theta, *(Space.fp32(n, size) for size in (channels, hidden, out)), run)


def coefficients(parts: Tensor, params: DyReLUParams, settings: DyReLUSettings) -> tuple[Tensor, ...]:
    """Compute the coefficients.

    Args:
        parts: Summands of the mean of each plane, (N, summands, C).
        params: Parameters of the layers.
        settings: Start and range of the coefficients.

    Returns:
        The coefficients, (N, C or 1, 2K), in memory with the channels last; and what their gradients are computed from:
        the means, the hidden units and the residuals.
    """
    plan = _plan_coefficients(parts, *params[:4], settings.starts, settings.ranges)
    theta = plan.theta.allocate(parts)
    if plan.reduced:
        parts = parts.sum(1, keepdim=True)
    if plan.hidden is not None:
        mean, hidden, residual = (space.allocate(parts) for space in (plan.mean, plan.hidden, plan.residual))
        layers = [param.contiguous() for param in params[:4]]
        launch(plan.run, parts, *layers, mean, hidden, residual, theta)
    else:
        mean = parts.squeeze(1)
        hidden, residual = (t.contiguous() for t in mlp(mean, params))
        launch(plan.run, residual, theta)
    return theta, mean, hidden, residual


class _CoefficientsBackward(NamedTuple):
    """What is planned of the gradients of that.

    Attributes:
        reduced: Whether the summands of the gradients of the coefficients are added up first.
        dparams: The gradients of the four parameters, None where the layers are left to PyTorch.
        run: The kernel that comes first.
        run_params: The kernel that computes the gradients of the parameters, likewise.
    """
    reduced: bool
    dparams: tuple[Space, ...] | None
    run: Launch
    run_params: Launch | None


@planned
def _plan_coefficients_backward(
        dtheta: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor,
        ranges: tuple[float, ...],
) -> _CoefficientsBackward:
    n, (hidden, channels), out = dtheta.shape[0], fc1_weight.shape, fc2_weight.shape[0]
    coefs = len(ranges)
    rows = math.prod(dtheta.shape[1:]) // out
    reduced = _are_many(rows, out)
    rows = 1 if reduced else rows
    if not _are_few(fc1_weight, fc2_weight):
        block_o = min(_block(out), 256)
        blocks = cdiv(out, block_o)
        run = Launch(
            _head_backward_kernel, n * blocks,
            rows=rows, out=out, blocks=blocks, scale=ranges, COEFS=coefs, BLOCK_R=_block(rows, block_o),
            BLOCK_O=block_o, num_warps=_WARPS,
        )
        return _CoefficientsBackward(reduced, None, run, None)
    block_h = _block(hidden)
    block_o = _block(out, block_h)
    run = Launch(
        _coefficients_backward_kernel, n,
        rows=rows, channels=channels, hidden=hidden, out=out, scale=ranges,
        COEFS=coefs, BLOCK_R=_block(rows, block_o), BLOCK_C=_block(channels, block_h), BLOCK_H=block_h,
        BLOCK_O=block_o, num_warps=_WARPS, **_REGISTERS,
    )
    tiles = [cdiv(len(t), _SIDE) * cdiv(t.shape[1], _SIDE) for t in (fc1_weight, fc2_weight)]
    run_params = Launch(
        _parameters_backward_kernel, sum(tiles),
        batch=n, channels=channels, hidden=hidden, out=out, tiles=tiles[0],
        BLOCK_N=_block(n, _SIDE * _SIDE), BLOCK_O=_SIDE, BLOCK_I=_SIDE, num_warps=_WARPS,
    )
    dparams = tuple(
        Space.of(torch.empty(t.shape, dtype=t.dtype, device='meta'))
        for t in (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    )
    return _CoefficientsBackward(reduced, dparams, run, run_params)


def coefficients_backward(
        dtheta: Tensor,
        mean: Tensor,
        hidden: Tensor,
        residual: Tensor,
        params: DyReLUParams,
        settings: DyReLUSettings,
) -> tuple[Tensor, ...]:
    """Compute the gradients of the means and of the four parameters.

    Args:
        dtheta: Summands of the gradients of the coefficients, of any shape that reads (N, summands, C or 1, 2K).
        mean: As ``coefficients`` has returned it.
        hidden: Likewise.
        residual: Likewise.
        params: Parameters of the layers.
        settings: Start and range of the coefficients.
    """
    plan = _plan_coefficients_backward(dtheta, *params[:4], settings.ranges)
    if plan.reduced:
        dtheta = dtheta.flatten(1).unflatten(1, (-1, residual.shape[1])).sum(1)
    dz = torch.empty_like(residual)
    if plan.dparams is None:
        launch(plan.run, dtheta, residual, dz)
        return mlp_backward(dz, mean, hidden, params)
    dhidden, dmean = torch.empty_like(hidden), torch.empty_like(mean)
    weights = params.fc1_weight.contiguous(), params.fc2_weight.contiguous()
    launch(plan.run, dtheta, residual, hidden, *weights, dz, dhidden, dmean)
    dparams = [space.allocate(dz) for space in plan.dparams]
    launch(plan.run_params, mean, hidden, dhidden, dz, *dparams)
    return dmean, *dparams


@planned
def _plan_attention(logits: Tensor, bias: Tensor, tau: float, divisor: float) -> Launch:
    return Launch(_attention_kernel, len(logits), tau=tau, divisor=divisor, **_row_options(logits))


@planned
def _plan_attention_backward(share: Tensor, tau: float, divisor: float) -> Launch:
    return Launch(_attention_backward_kernel, len(share), tau=tau, divisor=divisor, **_row_options(share))


def attention(logits: Tensor, bias: Tensor, settings: DyReLUSettings) -> tuple[Tensor, Tensor]:
    """Compute the attention, ``min(positions * softmax((logits + bias) / tau), 3)`` divided by 1 or 3.

    Args:
        logits: The logits of the positions, (N, 1, *spatial), contiguous. They are overwritten.
        bias: What is added to them.
        settings: Temperature and scale.

    Returns:
        The attention, and the attention before it is bounded and divided, which is written over the logits.
    """
    pi = torch.empty_like(logits)
    launch(_plan_attention(logits, bias, settings.tau, settings.divisor), logits, bias, pi)
    return pi, logits


def attention_backward(dpi: Tensor, share: Tensor, settings: DyReLUSettings) -> Tensor:
    """Compute the gradient of the logits and write it over that of the attention.

    That of the bias is zero: softmax does not see it.
    """
    launch(_plan_attention_backward(share, settings.tau, settings.divisor), dpi, share)
    return dpi
