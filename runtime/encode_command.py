"""The commands `embed` and `classify`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import InputError

if TYPE_CHECKING:
    from runtime.encode import EncodeOptions, Encoder, Variant
    from runtime.encoder_session import Floats

MAX_FILE_BYTES = 256 << 20


def add_encode(command: argparse.ArgumentParser, *, embeds: bool) -> None:
    """The options of either command."""
    add = command.add_argument
    add("bundle", metavar="BUNDLE", type=Path)
    texts = command.add_argument_group("texts, in the order given; at least one").add_argument
    texts("--text", dest="texts", action="append", default=[], metavar="TEXT")
    texts("--pair", dest="pairs", action="append", default=[], metavar="TEXT", help="the second text of each --text")
    texts("--text-file", type=Path, metavar="FILE", help="one text a line, after those of --text")
    way = command.add_argument_group("how the experts are mixed; default: by the gate").add_mutually_exclusive_group()
    several = "a variant that `inspect` lists; repeated: every text under each, in one batch"
    way.add_argument("--variant", dest="variants", action="append", default=[], metavar="NAME", help=several)
    fixed = "fixed scalings, 'base' for no expert, or a mix file"
    way.add_argument("--mix", metavar="math=0.7,code=0.3|FILE.json", help=fixed)
    add("--truncate", action="store_true", help="cut texts that are too long; default: refuse them")
    add("--batch-size", type=int, default=16, metavar="N", help="texts that run together (default 16)")
    add("--graph", metavar="NAME", help="a graph's name or mode (default: the variant's, or the dynamic one)")
    add("--backend", default="ort", choices=("ort", "trt", "trt-rtx"), help="encoders run on ort only")
    add("--provider", default="cpu", choices=("cpu", "cuda", "tensorrt", "nv-tensorrt-rtx"))
    add("--threads", type=int, metavar="N")
    if embeds:
        add("--out", type=Path, metavar="FILE.npy", help="write float32 [texts, width]; default: a JSON line a text")
    else:
        add("--json", action="store_true", help="print one JSON object a text")
    add("-q", "--quiet", action="store_true", help="do not say on stderr what runs")


def embed(args: argparse.Namespace) -> int:
    """Print or write one embedding a text."""
    from runtime.encode import embed as embed_texts

    if args.out is not None and (args.out.suffix != ".npy" or not args.out.parent.is_dir()):
        need = "FILE.npy in a folder that exists"
        raise InputError("cannot write there", where="--out", got=str(args.out), need=need)
    with _opened(args) as encoder:
        variants = _variants(args)
        found = embed_texts(encoder, variants, _options(args))
        if args.out is None:
            for variant, row in zip(variants, found, strict=True):
                print(json.dumps({"variant": variant.variant, "embedding": row.tolist()}))
            return 0
    _write(args.out, found)
    print(args.out)
    return 0


def classify(args: argparse.Namespace) -> int:
    """Print each text's label and its score."""
    from runtime.encode import classify as classify_texts
    from runtime.inspect import printable

    with _opened(args) as encoder:
        for found in classify_texts(encoder, _variants(args), _options(args)):
            label = f"{found.variant}: " if len(args.variants) > 1 else ""
            as_text = printable(f"{label}{found.label}  {found.score:.4f}")
            print(json.dumps(dataclasses.asdict(found), ensure_ascii=False) if args.json else as_text)
    return 0


def _opened(args: argparse.Namespace) -> Encoder:
    if args.graph and args.variants:
        raise InputError("a variant names its graph", got="--variant and --graph", fix="leave out --graph")
    if not args.texts and args.text_file is None:
        raise InputError("no text", fix="give --text TEXT or --text-file FILE")
    if args.pairs and (len(args.pairs) != len(args.texts) or args.text_file is not None):
        got = f"{len(args.texts)} --text, {len(args.pairs)} --pair" + (" and a --text-file" if args.text_file else "")
        raise InputError("every --text needs its own --pair", got=got)
    from runtime.encode import load_encoder
    from runtime.inspect import verification_of

    encoder = load_encoder(
        args.bundle,
        backend=args.backend,
        graph=args.graph,
        variant=next(iter(args.variants), None),
        provider=args.provider,
        threads=args.threads,
    )
    if not args.quiet:
        verified = verification_of(encoder.manifest, encoder.graph.name)
        print(f"graph {encoder.graph.name} on {encoder.session.provider}; {verified}", file=sys.stderr, flush=True)
    return encoder


def _variants(args: argparse.Namespace) -> list[Variant]:
    """Every text under every variant asked for."""
    from runtime.encode import Variant

    texts = [*(zip(args.texts, args.pairs, strict=True) if args.pairs else args.texts), *_lines(args.text_file)]
    return [Variant(text, variant) for text in texts for variant in args.variants or [None]]


def _options(args: argparse.Namespace) -> EncodeOptions:
    from runtime.encode import EncodeOptions
    from runtime.mix_file import mix_from_word

    mix = None if args.mix is None else mix_from_word(args.mix)
    return EncodeOptions(mix=mix, batch_size=args.batch_size, truncate=args.truncate)


def _lines(path: Path | None) -> list[str]:
    """The lines of a file; an empty one is a text, too."""
    if path is None:
        return []
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) <= MAX_FILE_BYTES:
            return data.decode().removesuffix("\n").split("\n")
        problem = f"more than {MAX_FILE_BYTES} bytes"
    except OSError as error:
        problem = error.strerror or str(error)
    except UnicodeDecodeError as error:
        problem = str(error)
    raise InputError("cannot read the texts", where=str(path), got=problem, need="UTF-8, one text a line")


def _write(path: Path, found: Floats) -> None:
    """All of it or nothing."""
    import numpy as np

    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            np.save(file, found, allow_pickle=False)
        part.replace(path)
    except OSError as error:
        raise InputError("cannot write the embeddings", where=str(path), got=error.strerror or str(error)) from error
    finally:
        part.unlink(missing_ok=True)
