"""Products that share an input, merged while decoding: the same answers, in the same memory, under the same names."""

import filecmp

import pytest
import safetensors.torch
import torch
from conftest import fold_early_by
from pico import convert, make_model, make_tokens, relative_error
from torch.overrides import TorchFunctionMode

from linearize.decoding import Decoder
from linearize.merged_products import can_merge
from linearize.state import read

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEW, IDS = 3, make_tokens(1, 13).to(DEVICE)


@pytest.fixture(scope="module", autouse=True)
def early():
    with pytest.MonkeyPatch.context() as monkeypatch:
        fold_early_by(monkeypatch)
        yield


def make(name="llama", **settings):
    return convert(make_model(name, num_hidden_layers=1, **settings)).to(DEVICE)


def static(model):
    return Decoder(model, batch=1, mode="static")


def merged(decoder) -> list[list[int]]:
    return [product.sizes for product in decoder.merged.products]


def check_answers(decoder, model):
    """The decoder's against those of the model's own cache."""
    eager = Decoder(model, batch=1, mode="eager")
    first, tokens = (torch.cat([d.prefill(IDS)[:, None], d.decode_n(NEW)], 1) for d in (decoder, eager))
    assert len(first.unique()) > 1, "a constant answer would prove nothing"
    assert torch.equal(first, tokens)
    assert relative_error(decoder.logits, eager.logits) < (1e-5 if DEVICE == "cpu" else 1e-4)


class Products(TorchFunctionMode):
    """Counts products of linear layers."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.nn.functional.linear
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "sizes", "products"),
    [
        ("llama", [[32, 16, 16], [48, 48]], 4),
        ("qwen2", [[32, 16, 16], [48, 48]], 4),  # with biases
        ("phi", [[32, 32, 32]], 4),  # biases everywhere, no gate
        ("phi3", [], 4),  # is one product already
        ("mixtral", [[32, 16, 16]], 3),  # its experts are no linear layers
    ],
)
def test_a_step_makes_one_product_of_an_input(name, sizes, products):
    model = make(name)
    decoder = static(model)
    assert merged(decoder) == sizes
    decoder.prefill(IDS)
    with Products() as counted:
        decoder.decode_one()
    assert counted.count == products + 1, "and the head"
    check_answers(decoder, model)
    assert not any("forward" in vars(module) or "part_of" in vars(module) for module in model.modules())


def test_memory_is_not_doubled_and_what_is_saved_is_as_before(tmp_path):
    model = make("qwen2")
    parameters, state = dict(model.named_parameters()), {n: x.clone() for n, x in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    decoder = static(model)
    model.save_pretrained(tmp_path / "after")
    attention = model.model.layers[0].self_attn
    q, k, v = (getattr(attention, f"{x}_proj").weight for x in "qkv")
    rows = decoder.merged.products[0].weight.split([32, 16, 16])
    assert [x.data_ptr() for x in (q, k, v)] == [x.data_ptr() for x in rows], "no memory beside it"
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters()), "and nobody needs to know"
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[n], x) for n, x in state.items())
    files = [path.name for path in (tmp_path / "before").iterdir()]
    assert "model.safetensors" in files
    assert filecmp.cmpfiles(tmp_path / "before", tmp_path / "after", files, shallow=False)[0] == files
    places = [p.data_ptr() for p in model.parameters()]
    static(model)
    assert places == [p.data_ptr() for p in model.parameters()], "another decoder finds them merged"


def test_a_decoder_follows_weights_that_moved_or_changed():
    model = make()
    decoder, attention = static(model), model.model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight.mul_(-0.5)
        attention.k_proj.weight.data = attention.k_proj.weight * 0.5
    check_answers(decoder, model)
    buffer = decoder.merged.products[0].weight
    assert attention.k_proj.weight.data_ptr() == buffer[32].data_ptr(), "a view again"
    model.load_state_dict({n: x.clone() * 1.1 for n, x in model.state_dict().items()}, assign=True)
    check_answers(decoder, model)


def test_rows_put_in_later_follow_too():
    model = make()
    decoder, weight = static(model), model.model.layers[0].self_attn.k_proj.weight
    decoder.prefill(IDS)
    with torch.no_grad():
        weight.data = weight * -0.5
    state = read(model, IDS)
    decoder.replace_rows([0], state, seeds=[0])
    got = decoder.decode_n(NEW)
    check_answers(static(model), model)
    expected = Decoder(model, batch=1, mode="eager")
    expected.start(state)
    assert torch.equal(got, expected.decode_n(NEW))
    assert relative_error(decoder.logits, expected.logits) < (1e-5 if DEVICE == "cpu" else 1e-4)


def test_a_forward_of_its_own_given_later_counts():
    model = make()
    decoder, linear = static(model), model.model.layers[0].self_attn.k_proj
    linear.forward = lambda x: -torch.nn.functional.linear(x, linear.weight)
    check_answers(decoder, model)
    assert merged(decoder) == [[48, 48]]


def test_a_model_that_decoded_in_inference_mode_can_still_train():
    model = make()
    with torch.inference_mode():
        static(model).prefill(IDS)
    assert not any(p.is_inference() for p in model.parameters())
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.norm() > 0


def test_what_is_not_plain_stays_alone():
    from peft import LoraConfig, inject_adapter_in_model

    model = make()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "gate_proj"], init_lora_weights=False), model)
    model.to(DEVICE)
    decoder = static(model)
    assert merged(decoder) == [[16, 16]], "k and v"
    check_answers(decoder, model)
    model = make()
    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda module, args, out: out * 2)
    decoder = static(model)
    assert merged(decoder) == [[32, 16], [48, 48]], "q and v"
    check_answers(decoder, model)
    hook.remove()
    decoder = static(model)
    assert merged(decoder) == [[32, 16, 16], [48, 48]]


def test_layers_of_different_sorts_do_not_merge():
    def linear(**options):
        return torch.nn.Linear(8, 4, **options)

    class Own(torch.nn.Linear):
        pass

    assert can_merge([linear(), linear()]) and can_merge([linear(bias=False), linear(bias=False)])
    assert not can_merge([linear(), linear(bias=False)])
    assert not can_merge([linear(), linear(dtype=torch.float64)])
    assert not can_merge([linear(), Own(8, 4)])
    shared = linear()
    shared.weight = (other := linear()).weight
    assert not can_merge([shared, other])
