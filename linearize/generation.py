"""Text generation from an exported folder, as the command line does it; a plain use of model.generate."""

import sys

import torch

from .errors import LinearizeError, ModelError
from .loading import load


def generate_text(folder, *, prompts: list[str], max_new_tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0,
                  chat: bool = False, seed: int | None = None, device: str = "auto") -> list[str]:  # fmt: skip
    """Continues each prompt and returns the new texts; a single one is streamed to stdout, several are printed.

    temperature 0 is greedy. chat puts each prompt through the tokenizer's chat template as a user's message.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise LinearizeError(f"temperature must be at least 0 and top-p in (0, 1], not {temperature} and {top_p}")
    if not prompts or any(not p for p in prompts):
        raise LinearizeError("a prompt is empty: give some text to continue")
    model, tokenizer = load(folder, device=device)
    inputs = {name: x.to(model.device) for name, x in _encode(tokenizer, prompts, chat).items()}
    if seed is not None:
        torch.manual_seed(seed)
    options = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p}
    options |= {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    if len(prompts) == 1:
        from transformers import TextStreamer

        options["streamer"] = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    output = model.generate(**inputs, **options)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if len(prompts) > 1:
        for prompt, text in zip(prompts, texts, strict=True):
            sys.stdout.write(f"{'' if chat else prompt}{text}\n\n")
    return texts


def _encode(tokenizer, prompts, chat):
    """Left-padded token ids and mask."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if chat and tokenizer.chat_template is None:
        raise ModelError("this model's tokenizer has no chat template; leave --chat out")
    if chat:
        messages = [[{"role": "user", "content": p}] for p in prompts]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", padding=len(prompts) > 1, return_dict=True
        )
    else:
        encoded = tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1)
    if not encoded["attention_mask"].any(1).all():
        raise LinearizeError("a prompt is empty for this tokenizer: give some text to continue")
    # some tokenizers also give token types, which decoders do not take
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}
