"""Text generation from an exported folder, as the command line does it."""

import sys

from .decoding import generate
from .errors import LinearizeError
from .lengths import max_positions
from .loading import load
from .process_prompts import check_chat
from .sampling import Sampling
from .state import State, read
from .whole_folder import check_folder_of


def generate_text(folder, *, prompts: list[str], max_new_tokens: int = 64, temperature: float = 0.0, top_k: int = 0,
                  top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0, stop: list[str] = (),
                  chat: bool = False, seed: int | None = None, device: str = "auto", state=None, save_state=None,
                  mode: str = "auto") -> list[str]:  # fmt: skip
    """Continues each prompt and returns the new texts; a single one is streamed to stdout, several are printed.

    temperature 0 is greedy. chat puts each prompt through the tokenizer's chat template as a user's message.
    state: file of a text read before, which each prompt follows. save_state: file to write instead of an
    answer, what the model remembers of the one prompt (after `state`); then returns no texts. mode: of `Decoder`.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    if not prompts or any(not p for p in prompts):
        raise LinearizeError("a prompt is empty: give some text to continue")
    try:
        "".join(prompts).encode()
    except UnicodeEncodeError as error:  # Python keeps the bytes of an argument that is no UTF-8 as such characters
        raise LinearizeError(f"a prompt is not UTF-8 text: {error}") from error
    if save_state and len(prompts) > 1:
        raise LinearizeError(f"--save-state writes the state of one text, not of {len(prompts)}")
    if save_state:
        check_folder_of(save_state)
    model, tokenizer = load(folder, device=device)
    before = State.load(state, model, tokenizer) if state else None
    if before is not None:  # rows of other lengths after one past: each is read alone
        encoded = [_encode(tokenizer, [prompt], chat, follows=True) for prompt in prompts]
        after = State.join([read(model, **one, state=before) for one in encoded])
    else:
        after = read(model, **_encode(tokenizer, prompts, chat))
    _warn_if_long(model, after, 0 if save_state else max_new_tokens)
    if save_state:
        after.save(save_state, model, tokenizer)
        print(f"{save_state}: {after.lengths[0].item():,} tokens, {after.num_bytes() / 2**20:,.1f} MiB")
        return []
    streamer = None
    if len(prompts) == 1:
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
        if not chat:
            sys.stdout.write(prompts[0])
    tokens = generate(
        model, state=after, max_new_tokens=max_new_tokens, sampling=sampling, pad=tokenizer.pad_token_id,
        stop_strings=stop, tokenizer=tokenizer, mode=mode, on_tokens=streamer and streamer.put,
    )  # fmt: skip
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    if streamer:
        streamer.end()
    else:
        for prompt, text in zip(prompts, texts, strict=True):
            sys.stdout.write(f"{'' if chat else prompt}{text}\n\n")
    return texts


def _warn_if_long(model, state: State, new: int) -> None:
    """The memory holds any length; whether the model makes sense of it is another matter."""
    longest, positions = state.lengths.max().item(), max_positions(model)
    if longest + new > positions:
        print(f"warning: {longest:,} tokens and {new:,} new ones are more than the {positions:,} positions that the "
              "model was made for", file=sys.stderr)  # fmt: skip


def _encode(tokenizer, prompts, chat, *, follows=False):
    """Left-padded token ids and mask. follows: the texts go on after another, so they begin without a special token."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if chat:
        check_chat(tokenizer)
        messages = [[{"role": "user", "content": p}] for p in prompts]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", padding=len(prompts) > 1, return_dict=True
        )
    else:
        encoded = tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1, add_special_tokens=not follows)
    if not encoded["attention_mask"].any(1).all():
        raise LinearizeError("a prompt is empty for this tokenizer: give some text to continue")
    # some tokenizers also give token types, which decoders do not take
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}
