"""Generation: prompts of similar length together, keys and values cached, the head on the last position only.

On the CPU, rows that are finished are dropped and the cache is read up to its present length. On CUDA every step of a batch has the same
shapes, so that one compiled graph serves them all; whether everybody is finished is asked every few steps, since asking waits for the GPU.

Shapes: B prompts, T the longest one's tokens, V vocabulary.
"""

import math

import torch

from data import batches_by_length
from data.ranks import all_true, is_sharded
from lora import merged_lora
from model import KVCache, Transformer

POLL = 8  # steps between two looks at whether all rows are finished, on CUDA


def sample(logits: torch.Tensor, temperature: float, top_p: float, generator) -> torch.Tensor:
    """Next tokens (B,) from logits (B, V): the argmax at temperature 0, else from the smallest set of mass ≥ top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ranked, order = probs.sort(-1, descending=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0.0)  # the first one always stays
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def first_logits(model: Transformer, tokens: torch.Tensor, real: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Logits (B, V) of the next token, after tokens (B, T), left-padded, with which the cache is filled."""
    hidden, _ = model.model(tokens, real, cache, rows=real.flatten().nonzero()[:, 0])  # (n, H)
    return model.lm_head(hidden[real.sum(-1).cumsum(0) - 1])


def next_logits(model: Transformer, tokens: torch.Tensor, real: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Logits (B, V) of the next token, after tokens (B, 1) that follow what is in the cache."""
    return model.lm_head(model.model(tokens, real, cache)[0][:, -1])


@torch.no_grad()
def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0,
             seed: int = 0, batch_size: int = 64, progress=lambda n: None, static: bool | None = None) -> list[list[int]]:
    """Complete each prompt (token ids); returns the new tokens of each, up to and without the first EOS id of the checkpoint.

    The same seed, prompts and batch_size give the same samples. progress(n) is called when n more prompts are complete. static: compiled
    steps of one shape (default: on CUDA, but for weights spread over processes). Several processes call it together, with equally many
    prompts each. Raises ValueError for an empty prompt, or one too long for `max_position_embeddings`.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not prompts or min(lengths) == 0:
        raise ValueError("generate: expected at least one prompt, each of at least one token")
    capacity, limit = max(lengths) + max_new_tokens, model.config.max_position_embeddings
    if capacity > limit:
        raise ValueError(f"generate: {max(lengths)} prompt tokens + {max_new_tokens} new ones exceed max_position_embeddings = {limit}")
    if static is None:
        static = model.device.type == "cuda" and not any(is_sharded(parameter) for parameter in model.parameters())
    generator, completions, cache = torch.Generator(model.device).manual_seed(seed), [[]] * len(prompts), None
    with merged_lora(model):
        for batch in batches_by_length(lengths, batch_size):
            rows, room = [prompts[i] for i in batch], lengths[batch[-1]] + max_new_tokens
            if static:
                rows += rows[-1:] * (batch_size - len(rows))
                room = max(128, 1 << (room - 1).bit_length())  # few sizes: each is compiled anew
                if cache is None or cache.capacity != room:
                    cache = KVCache(model.config, batch_size, room, model.device, model.lm_head.weight.dtype)
                    for tensor in cache.keys + cache.values:
                        torch._dynamo.mark_static_address(tensor, guard=False)
            found = _complete(model, rows, max_new_tokens, room, temperature, top_p, generator, cache)
            for i, ids in zip(batch, found):
                completions[i] = ids
            progress(len(batch))
    return completions


def _complete(model, prompts, max_new_tokens, room, temperature, top_p, generator, static_cache) -> list[list[int]]:
    """One batch, left-padded."""
    B, T, device, ends = len(prompts), max(map(len, prompts)), model.device, model.config.eos_token_ids
    stop, static = torch.tensor(ends, device=device, dtype=torch.long), static_cache is not None
    ids = torch.zeros(B, T + max_new_tokens, device=device, dtype=torch.long)
    real = torch.zeros(B, room, device=device, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, T - len(prompt) : T] = torch.tensor(prompt, device=device)
        real[row, T - len(prompt) : T] = True
    switch = model.config.rope["original_max_position_embeddings"] if model.config.rope["rope_type"] == "longrope" else math.inf

    # Several samples of one prompt: its keys and values are computed once.
    number = {}  # prompt → its number among the different ones
    which = [number.setdefault(tuple(prompt), len(number)) for prompt in prompts]
    first = torch.tensor([which.index(i) for i in range(len(number))], device=device)
    which = torch.tensor(which, device=device)
    cache = KVCache(model.config, len(number), T if static else room, device, model.lm_head.weight.dtype)
    logits = first_logits(model, ids[first, :T], real[first, :T], cache)[which]
    if static:
        for whole, part in zip(static_cache.keys + static_cache.values, cache.keys + cache.values):
            whole[:, :, :T] = part[which]
        cache = static_cache
    else:
        cache.keep(which)

    decode = torch.compile(next_logits, dynamic=False, mode="reduce-overhead") if static else next_logits
    live, done = torch.arange(B, device=device), torch.zeros(B, device=device, dtype=torch.bool)  # rows not dropped; which are finished
    for end in range(T, T + max_new_tokens):  # tokens so far, padding included
        new = sample(logits, temperature, top_p, generator)  # (rows,)
        ids[live, end] = new
        real[:, end : end + 1] = True
        done |= torch.isin(new, stop)
        last = end + 1 == T + max_new_tokens
        if last or (not static or (end - T) % POLL == POLL - 1) and all_true(done.all()):
            break
        if not static and len(done) / 4 <= done.sum() < len(done):  # a copy of the cache, worth it where it spares a quarter of the rows
            keep = ~done
            cache.keep(keep)
            live, real, done, new = live[keep], real[keep], done[keep], new[keep]
        if any(len(prompt) + end - T == switch for prompt in prompts):  # long RoPE changes at the next token: cached keys are out of date
            cache.length, cache.slot = 0, None
            logits = first_logits(model, ids[live, : end + 1], real[:, : end + 1], cache)
        elif static:
            cache.slot = torch.full((1,), end, device=device)
            logits = decode(model, new[:, None], real, cache)
        else:
            logits = next_logits(model, new[:, None], real[:, : end + 1], cache)
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in ids[:, T:].tolist()]
