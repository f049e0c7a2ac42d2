"""Documents as bags of words: UMBC and Deep Sets beside TF-IDF with logistic regression.

    python examples/document_classification.py                                        # a synthetic corpus; 1 minute
    python examples/document_classification.py --data-root DATA                       # 20 newsgroups; 4 minutes
    python examples/document_classification.py --data-root DATA --corpus eurlex       # long documents, many labels

A document is the set of its words with TF-IDF weights, the same for all models; UMBC (Willette et al. 2023,
arXiv 2208.12401) pools it into slots, Deep Sets into a mean, under the same embedding and decoder. Both are trained on
random halves of the words. Documents may have any length: their gradients are sampled, one chunk of words a document.

Of the newsgroups (DATA/text/20newsgroups_bydate.jsonl.xz, the split by date) headers, quoted lines and the lines that
introduce them are stripped: they give the group away. EUR-Lex (DATA/text/eurlex_sum_en_cap60k.jsonl.xz) are 1,504 acts
of thousands of words, with the tags that 30 or more training documents carry; micro-F1 at probability 1/2. The paper's
long documents are EURLEX57K with BERT embeddings: its figures do not compare.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from common import arguments, he_init, plotter, save, save_picture, spread, table
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import setenc
from setenc import tasks

SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
COLOURS = {"UMBC": "#1b7837", "Deep Sets": "#2166ac", "TF-IDF + logistic regression": "0.4"}


@dataclass(frozen=True, eq=False)
class Corpus:
    """Texts of both splits; labels ``(n,)`` int64, or ``(n, L)`` of zeros and ones where documents have several."""

    name: str
    train: list[str]
    test: list[str]
    train_labels: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        """Number of classes, or of labels."""
        return self.train_labels.shape[1] if self.train_labels.ndim == 2 else int(self.train_labels.max()) + 1


def synthetic(n: int, generator: torch.Generator) -> Corpus:
    """Ten classes, one a pair of five topics: a few words of both topics among words that all documents share."""
    pairs = torch.combinations(torch.arange(5))
    labels = torch.randint(10, (n,), generator=generator)
    texts = []
    for label in labels:
        length = int(torch.randint(40, 200, (), generator=generator))
        common = (500 * torch.rand(length, generator=generator) ** 3).long()
        words = [f"common{i}" for i in common.tolist()]
        for topic in pairs[label].tolist():
            chosen = torch.randint(60, (4,), generator=generator).tolist()
            words += [f"topic{topic}word{i}" for i in chosen]
        stray = torch.randint(60, (2,), generator=generator).tolist()
        words += [f"topic{int(torch.randint(5, (), generator=generator))}word{i}" for i in stray]
        texts.append(" ".join(words))
    half = n // 2
    return Corpus("synthetic", texts[:half], texts[half:], labels[:half], labels[half:])


def read(path: Path) -> list[dict[str, Any]]:
    """Records of an xz-compressed file of JSON lines."""
    if not path.is_file():
        raise SystemExit(f"no file {path}: --data-root must hold text/{path.name}")
    with lzma.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def body(text: str) -> str:
    """A Usenet post without headers, without quoted lines and without the lines that introduce quotes."""
    lines = text.replace("\t", "\n").split("\n")
    lines = lines[lines.index("") + 1 :] if "" in lines else lines
    while lines and (not lines[0].strip() or re.match(r"[\w-]+: ", lines[0])):
        lines.pop(0)
    return "\n".join(line for line in lines if not re.match(r"\s*[>|:]|.*(writes|wrote):?\s*$|In article", line))


def newsgroups(root: Path) -> Corpus:
    """20 newsgroups, split by date."""
    records = read(root / "text" / "20newsgroups_bydate.jsonl.xz")
    parts = [[record for record in records if record["split"] == split] for split in ("train", "test")]
    texts = [[body(record["text"]) for record in part] for part in parts]
    labels = [torch.tensor([record["label"] for record in part]) for part in parts]
    return Corpus("20 newsgroups", texts[0], texts[1], labels[0], labels[1])


def eurlex(root: Path) -> Corpus:
    """Acts of the European Union with their frequent tags; the validation part is left out."""
    records = read(root / "text" / "eurlex_sum_en_cap60k.jsonl.xz")
    parts = [[record for record in records if record["split"] == split] for split in ("train", "test")]
    counts = Counter(tag for record in parts[0] for tag in set(record["tags"]))
    tags = sorted(tag for tag, count in counts.items() if count >= 30)
    texts = [[record["text"] for record in part] for part in parts]
    labels = [torch.tensor([[float(tag in record["tags"]) for tag in tags] for record in part]) for part in parts]
    return Corpus("EUR-Lex", texts[0], texts[1], labels[0], labels[1])


def bags(matrix: Any, rows: np.ndarray) -> tuple[setenc.Ragged, Tensor]:
    """Documents of a sparse matrix of counts as sets of word ids, and the words' weights."""
    part = matrix[rows]
    words = torch.from_numpy(part.indices.astype(np.int64))
    return setenc.Ragged(words, torch.from_numpy(part.indptr.astype(np.int64))), torch.from_numpy(part.data).float()


def thinned(matrix: Any, share: float, seed: int) -> Any:
    """The matrix with a random share of each document's words, rows of norm 1 again."""
    from sklearn.preprocessing import normalize

    part = matrix.copy()
    part.data = part.data * (np.random.default_rng(seed).random(len(part.data)) < share)
    part.eliminate_zeros()
    return normalize(part)


def classifier(pooling: str, vocabulary: int, classes: int, args: argparse.Namespace) -> tasks.TokenBagClassifier:
    """`setenc.tasks.TokenBagClassifier` with slots or with a mean."""
    pool = setenc.DeepSetsPooling(args.width, args.width, norm=True) if pooling == "Deep Sets" else None
    words = nn.Embedding(vocabulary, args.width)
    nn.init.normal_(words.weight, std=0.02)  # small, so that the few updates of a rare word move it
    options = {"width": args.width, "num_slots": args.slots, "embedding": words, "pooling": pool}
    return he_init(tasks.TokenBagClassifier(vocabulary, classes, **options))


def train(pooling: str, matrix: Any, corpus: Corpus, args: argparse.Namespace, seed: int) -> tuple[nn.Module, float]:
    """A trained model in eval mode, and the seconds of processor time it took."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = classifier(pooling, matrix.shape[1], corpus.classes, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=max(args.steps, 2))
    began = time.process_time()
    for _ in tqdm(range(args.steps), desc=f"{corpus.name}: {pooling}", unit="step", mininterval=1):
        rows = torch.randint(len(corpus.train), (args.batch,), generator=generator)
        words, weights = bags(matrix, rows.numpy())
        weights = weights * (torch.rand(weights.shape, generator=generator) < 0.5)
        options = {"weights": weights, "chunk_size": args.chunk, "gradient": "sampled", "generator": generator}
        labels = corpus.train_labels[rows]
        optimizer.zero_grad()
        if labels.ndim == 2:
            loss = model.loss(words, labels, **options)
        else:
            loss = F.cross_entropy(model(words, **options), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval(), time.process_time() - began


@torch.no_grad()
def logits(model: nn.Module, matrix: Any, chunk: int) -> Tensor:
    """Logits of all documents, 200 at a time, streamed."""
    found = []
    for begin in range(0, matrix.shape[0], 200):
        words, weights = bags(matrix, np.arange(begin, min(begin + 200, matrix.shape[0])))
        found.append(model(words, weights=weights, chunk_size=chunk, gradient="none"))
    return torch.cat(found)


def measure(scores: Tensor, labels: Tensor) -> float:
    """Accuracy, or micro-F1 where documents have several labels."""
    if labels.ndim == 2:
        return float(tasks.micro_f1(scores, labels))
    return float((scores.argmax(1) == labels).float().mean())


def linear_peer(train: Any, tests: dict[float, Any], corpus: Corpus) -> tuple[list[float], float]:
    """scikit-learn's TF-IDF and logistic regression (one for each label where there are several)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    several = corpus.train_labels.ndim == 2
    regression = LogisticRegression(C=10.0, max_iter=300)
    peer = OneVsRestClassifier(regression) if several else regression
    began = time.process_time()
    peer.fit(train, corpus.train_labels.numpy())
    seconds = time.process_time() - began
    scores = [torch.from_numpy(peer.decision_function(test)) for test in tests.values()]
    return [measure(score, corpus.test_labels) for score in scores], seconds


def picture(found: dict[str, list[list[float]]], title: str, path: Path) -> None:
    """The measure over the share of a test document's words."""
    plt = plotter()
    figure, ax = plt.subplots(figsize=(6, 4))
    for name, runs in found.items():
        ax.plot(
            SHARES, [mean(values) for values in zip(*runs, strict=True)], "o-", ms=4, color=COLOURS[name], label=name
        )
    ax.set(xscale="log", xlabel="share of a document's words that is read", title=title)
    ax.set_xticks(SHARES, [f"{100 * share:.0f} %" for share in SHARES])
    ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    figure.tight_layout()
    save_picture(figure, path)


def load(args: argparse.Namespace) -> Corpus:
    """The corpus that the options name."""
    if args.data_root is None:
        return synthetic(400 if args.quick else 4000, torch.Generator().manual_seed(args.seed))
    corpus = {"newsgroups": newsgroups, "eurlex": eurlex}[args.corpus](args.data_root)
    if not args.quick:
        return corpus
    parts = corpus.train, corpus.test, corpus.train_labels, corpus.test_labels
    return Corpus(corpus.name, *(part[:: max(1, len(part) // 300)] for part in parts))


def main() -> None:
    parser = arguments(__doc__, "document_classification")
    parser.add_argument("--corpus", choices=("newsgroups", "eurlex"), default="newsgroups", help="with --data-root")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64, help="documents a step")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=20_000, help="most frequent words of the training documents")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=256, help="different words of a document in memory at a time")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.05)
    args = parser.parse_args()
    if args.data_root is None:
        args.steps = min(args.steps, 400)
    if args.quick:
        args.steps, args.width, args.slots, args.vocabulary = 30, 16, 4, 2000
    args.out.mkdir(parents=True, exist_ok=True)

    from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer

    corpus = load(args)
    counter = CountVectorizer(max_features=args.vocabulary, min_df=2)
    matrices = [counter.fit_transform(corpus.train), counter.transform(corpus.test)]
    weigh = TfidfTransformer(sublinear_tf=True).fit(matrices[0])
    matrices = [weigh.transform(matrix) for matrix in matrices]
    tests = {share: thinned(matrices[1], share, args.seed) for share in SHARES}
    found, seconds, sizes = {}, {}, {}
    for pooling in ("UMBC", "Deep Sets"):
        found[pooling], spent = [], []
        for seed in range(args.seed, args.seed + args.seeds):
            model, cost = train(pooling, matrices[0], corpus, args, seed)
            scores = [logits(model, test, args.chunk) for test in tests.values()]
            found[pooling].append([measure(score, corpus.test_labels) for score in scores])
            spent.append(cost)
        seconds[pooling], sizes[pooling] = mean(spent), sum(p.numel() for p in model.parameters())
    peer = "TF-IDF + logistic regression"
    values, seconds[peer] = linear_peer(matrices[0], tests, corpus)
    found[peer] = [values]
    sizes[peer] = (matrices[0].shape[1] + 1) * corpus.classes
    what = "micro-F1" if corpus.train_labels.ndim == 2 else "accuracy"
    header = ["model", *(f"{100 * share:.0f} % of the words" for share in SHARES), "parameters", "CPU s to train"]
    rows = [
        [name, *(spread(v) for v in zip(*runs, strict=True)), f"{sizes[name]:,}", f"{seconds[name]:.0f}"]
        for name, runs in found.items()
    ]
    length = np.diff(matrices[0].indptr)
    page = (
        f"# Documents as sets of words: {corpus.name}\n\nTest {what}, also from a random share of each document's "
        f"words. {len(corpus.train):,} training and {len(corpus.test):,} test documents, {corpus.classes} "
        f"{'labels' if what == 'micro-F1' else 'classes'}; {np.median(length):.0f} different words of the vocabulary "
        f"of {matrices[0].shape[1]:,} in a document (median; at most {length.max():,}). {args.steps:,} steps of "
        f"{args.batch} documents, {args.seeds} seed(s), fixed beforehand; of a long document {args.chunk} words are "
        f"backpropagated.\n\n{table(header, rows)}"
    )
    picture(found, f"{corpus.name}: {what}", args.out / "document_classification.png")
    facts = {"corpus": corpus.name, "measure": what, "shares": SHARES, "scores": found, "seconds": seconds}
    save("document_classification", args, page, facts)


if __name__ == "__main__":
    main()
