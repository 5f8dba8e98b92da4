"""A small model behind a real server, on a port of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from glm_core.config import ModelConfig
from glm_core.data.tokenizer import Tokenizer, train
from glm_core.model.glm import GLM
from glm_core.pretrained.chat_model import BlankFillingModel, CausalModel
from glm_core.pretrained.templates import GLM4, ChatTemplate
from glm_core.pretrained.tokenizers import FastTokenizer

TEXT = "The quick brown fox jumps over the lazy dog. 你好，世界 éà 🙂 again and again it runs. "


@pytest.fixture(scope="session")
def chat_model() -> BlankFillingModel:
    """A model of random weights: its replies are nonsense, the same each time."""
    tokenizer = Tokenizer(train([TEXT * 20], 340))
    config = ModelConfig(
        num_layers=2, hidden=32, num_heads=2, ffn=48, vocab=384, max_length=512, tied_head=False
    )
    model, g = GLM(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = 0.05 if p.ndim == 1 else 1.5 * p.shape[1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=g) * std + name.endswith("norm.weight"))
    stop = (tokenizer.eop, tokenizer.eos)
    return BlankFillingModel(model=model, tokenizer=tokenizer, name="small", stop=stop)


@pytest.fixture(scope="session")
def causal_model(chat_tokenizer: FastTokenizer) -> CausalModel:
    """A causal model of random weights, with GLM-4's chat template."""
    config = ModelConfig(
        num_layers=1, hidden=32, num_heads=2, ffn=32, vocab=352, max_length=512, placement="pre"
    )
    model, g = GLM(config).requires_grad_(False), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=g))
    stop = tuple(chat_tokenizer.special[n] for n in ("<|endoftext|>", "<|user|>"))
    return CausalModel(
        model=model,
        tokenizer=chat_tokenizer,
        name="glm-4",
        stop=stop,
        template=ChatTemplate(source=GLM4),
    )


SPECIAL = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> FastTokenizer:
    """A small byte-level tokenizer with GLM-4's role tokens."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT] * 9, trainer)
    made.add_special_tokens(list(SPECIAL))
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(file))
    return FastTokenizer(file)


class Served(NamedTuple):
    """A server under test."""

    url: str
    engine: Any


@pytest.fixture(scope="session")
def serving(
    chat_model: BlankFillingModel,
) -> Callable[..., contextlib.AbstractContextManager[Served]]:
    """Returns a context manager that runs a server: serving(slots=..., queue=..., token=...,
    ...)."""
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    from glm_core.backends import registry
    from glm_core.serve import api
    from glm_core.serve.engine import Engine
    from glm_core.serve.limits import Limits

    @contextlib.contextmanager
    def serve(
        slots: int = 4,
        queue: int = 16,
        model: Any = chat_model,
        chunk: int = 512,
        loras: Any = None,
        **limits: Any,
    ) -> Iterator[Served]:
        how = {"slots": slots, "queue": queue, "chunk": chunk, "loras": loras}
        engine = Engine(model, registry.usable("cpu"), **how)
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        started = threading.Event()

        class Server(uvicorn.Server):  # type: ignore[name-defined, misc]  # uvicorn is imported at run time
            async def startup(self, sockets: Any = None) -> None:
                await super().startup(sockets)
                started.set()

        config = uvicorn.Config(
            api.app(engine, Limits(**limits)),
            log_level="error",
            timeout_graceful_shutdown=1,
            lifespan="off",
        )
        server = Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        assert started.wait(60)
        try:
            yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", engine)
        finally:
            server.should_exit = True
            thread.join()
            engine.close()
            listening.close()

    return serve


@pytest.fixture(scope="session")
def server(serving: Any) -> Iterator[Served]:
    """A server shared by all tests without special limits."""
    with serving(max_tokens=200, max_body=4000) as served:
        yield served
