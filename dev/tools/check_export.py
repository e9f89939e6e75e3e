#!/usr/bin/env python3
"""
Checks that exported networks compute the same. Compares train_gpas, llama2.c, transformers and,
with --converter, llama.cpp on checkpoints of trained networks:

    pip install torch transformers                  # for --converter also: gguf llama-cpp-python
    python3 dev/tools/check_export.py --llama2c ../llama2.c out/*/ckpt_000800.safetensors

Each of ten prompts is continued by the likeliest token, at most 64 times. The tokens must be equal,
and the logits at every position may differ by at most 1e-3. What train_gpas and an unmodified
llama2.c print must be equal too. `make test` runs dev/test/test_export.py instead, which needs no
libraries. Run this in the project's folder; --llama2c names the folder of karpathy's llama2.c.
"""
import os
import struct
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [os.path.join(HERE, ".."), os.path.join(HERE, "../test")]
from command import Error, Parser, main
from harness import check, summary

LENGTH, TOLERANCE = 64, 1e-3
PROMPTS = ["", "Once upon a time", "Lily", "The dog ran to", "\"Can I play", "One day, Tom saw a",
           "In the garden there was", "He was very  sad", "caf\u00e9 \u201cquoted\u201d",
           "A\nnew line"]
ENCODED = ["", " two  spaces ", "tab\tand\nline", "\u00fc\u4e2d\U0001F600", "1234 567", "<0x41>",
           "~"]

# Each driver prints two int32, the length of the prompt and of the whole text, then the tokens,
# then their logits. LENGTH=0 only encodes.
OURS = r"""
#define TRAIN_GPAS_NO_MAIN
#include "train_gpas.c"
int main(int argc, char **argv) {
    static Options o;
    static Model model;
    static Run run;
    parse_options(&o, argc, argv);
    open_run(&run, &model, &o);
    int length = atoi(getenv("LENGTH")), tokens[1000];
    int prompt = tokenizer_encode(&run.tokenizer, o.prompt, tokens), n = prompt;
    for (int ended = 0; n < prompt + length && !ended; n++) {
        model_forward(&model, tokens, NULL, 1, n);
        const float *logits = model_logits(&model, n - 1);
        tokens[n] = sample_token(logits, o.vocab_size, 0, 1, NULL, NULL);
        ended = tokens[n] == TOKEN_BOS || tokens[n] == TOKEN_EOS;
    }
    fwrite(&prompt, 4, 1, stdout);
    fwrite(&n, 4, 1, stdout);
    fwrite(tokens, 4, n, stdout);
    if (length) model_forward(&model, tokens, NULL, 1, n);
    for (int i = 0; i < n && length; i++)
        fwrite(model_logits(&model, i), 4, o.vocab_size, stdout);
    return 0;
}
"""
LLAMA2C = r"""
#define TESTING
#include "run.c"
int main(int argc, char **argv) {
    Transformer t;
    Tokenizer k;
    int length = atoi(getenv("LENGTH")), tokens[1000], prompt;
    build_transformer(&t, argv[1]);
    build_tokenizer(&k, argv[2], t.config.vocab_size);
    int V = t.config.vocab_size;
    encode(&k, argv[argc - 1], 1, 0, tokens, &prompt);
    float *logits = malloc((prompt + length) * V * sizeof(float));
    int n = prompt;
    for (int i = 0, ended = 0; i < n && length; i++) {
        memcpy(logits + i * V, forward(&t, tokens[i], i), V * sizeof(float));
        if (i < n - 1 || n == prompt + length || ended) continue;
        tokens[n] = sample_argmax(logits + i * V, V);
        ended = tokens[n] == 1 || tokens[n] == 2;
        n++;
    }
    fwrite(&prompt, 4, 1, stdout);
    fwrite(&n, 4, 1, stdout);
    fwrite(tokens, 4, n, stdout);
    if (length) fwrite(logits, 4, n * V, stdout);
    return 0;
}
"""


def call(*command, **environment):
    words = [word.encode("utf-8", "surrogateescape") for word in command]   # in any locale
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env={**os.environ, "OMP_WAIT_POLICY": "passive", **environment})
    if done.returncode:
        raise Error(f"{' '.join(command)}: {done.stderr.decode(errors='replace')}")
    return done.stdout


def compile_driver(source, include, path):
    with open(path + ".c", "w", encoding="utf-8") as file:
        file.write(source)
    call("gcc", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-w",
         "-I", include, path + ".c", "-o", path, "-lm")


def drive(length, *command):
    """(length of the prompt, tokens, logits as bytes)"""
    data = call(*command, LENGTH=str(length))
    prompt, n = struct.unpack_from("<2i", data)
    return prompt, list(struct.unpack_from(f"<{n}i", data, 8)), data[8 + 4 * n:]


def difference(a, b):
    return (a - b).abs().max().item()


def ascii_only(text):
    """llama2.c's run does not print byte tokens that are not ASCII."""
    return text.decode("ascii", "ignore").rstrip("\n")


def compare(checkpoint, folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    name, hf, l2 = os.path.relpath(checkpoint), f"{folder}/hf", f"{folder}/llama2c"
    for target, out in (("hf", hf), ("llama2c", l2)):
        call(sys.executable, "dev/tools/export.py", checkpoint, "--to", target, "--out", out)
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(hf)
    ours = [f"{folder}/ours", "--steps", "0", "--load", checkpoint, "--prompt"]
    theirs = [f"{folder}/theirs", f"{l2}/model.bin", f"{l2}/tokenizer.bin"]
    equal, printed, worst, tokens_seen = [], [], [0.0, 0.0], 0
    for prompt in PROMPTS:
        length, tokens, raw = drive(LENGTH, *ours, prompt)
        _, other_tokens, other_raw = drive(LENGTH, *theirs, prompt)
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                  max_new_tokens=LENGTH)[0].tolist()
            logits = model(torch.tensor([tokens])).logits[0]
        equal.append(tokens == other_tokens == made)
        tokens_seen += len(tokens) - length
        if tokens == other_tokens:
            a, b = (torch.frombuffer(bytearray(data), dtype=torch.float32).view_as(logits)
                    for data in (raw, other_raw))
            worst = [max(worst[0], difference(a, b)), max(worst[1], difference(a, logits))]
        story = call("./train_gpas", *ours[1:], prompt, "--temperature", "0", "--length",
                     str(LENGTH))
        run = call(f"{folder}/run", *theirs[1:2], "-z", theirs[2], "-t", "0", "-i", prompt, "-n",
                   str(length - 1 + LENGTH))
        printed.append(ascii_only(story) == ascii_only(run))
    check(all(equal), f"{name}: {len(PROMPTS)} continuations, {tokens_seen} tokens equal in all "
          "three", equal)
    check(all(printed), f"{name}: an unmodified run prints what train_gpas prints", printed)
    check(worst[0] <= TOLERANCE, f"{name}: logits of llama2.c differ by at most {worst[0]:.1e}")
    check(worst[1] <= TOLERANCE, f"{name}: logits of transformers differ by at most {worst[1]:.1e}")
    encoded = [drive(0, *ours, text)[1] == drive(0, *theirs, text)[1]
               == tokenizer(text)["input_ids"] for text in ENCODED + PROMPTS]
    check(all(encoded), f"{name}: {len(encoded)} texts have the same tokens in all three", encoded)
    back = [tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
            for text in ENCODED + PROMPTS]
    check(all(back), f"{name}: transformers decodes them into the same texts", back)
    return hf


def compare_llamacpp(checkpoint, hf, converter, folder):
    """The same for llama.cpp, with an fp32 cache (the default, fp16, changes logits by 0.01)."""
    import torch
    from llama_cpp import GGML_TYPE_F32, Llama
    name, gguf = os.path.relpath(checkpoint), f"{folder}/model.gguf"
    call(sys.executable, converter, hf, "--outtype", "f32", "--outfile", gguf)
    model = Llama(gguf, n_ctx=256, logits_all=True, verbose=False, n_gpu_layers=0,
                  type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32)
    ours = [f"{folder}/ours", "--steps", "0", "--load", checkpoint, "--prompt"]
    encoded, equal, worst = [], [], 0.0
    for prompt in PROMPTS:
        length, tokens, raw = drive(LENGTH, *ours, prompt)
        made = model.tokenize(prompt.encode(), special=False) if prompt else [1]
        encoded.append(made == tokens[:length])
        model.reset()
        model.eval(tokens)
        logits = torch.tensor(model.scores[:len(tokens)])
        worst = max(worst, difference(logits, torch.frombuffer(
            bytearray(raw), dtype=torch.float32).view_as(logits)))
        equal.append(logits[length - 1:-1].argmax(1).tolist() == tokens[length:])
    check(all(encoded), f"{name}: llama.cpp finds the same tokens in the prompts", encoded)
    check(all(equal), f"{name}: llama.cpp's likeliest tokens are the same", equal)
    check(worst <= TOLERANCE, f"{name}: logits of llama.cpp differ by at most {worst:.1e}")


def run():
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--llama2c", metavar="DIR", required=True, help="folder with its run.c")
    parser.add_argument("--converter", metavar="FILE", help="llama.cpp's convert_hf_to_gguf.py")
    args = parser.parse_args()
    call("make", "train_gpas")
    for checkpoint in args.checkpoints:
        with tempfile.TemporaryDirectory(dir="build") as folder:    # TMPDIR may forbid programs
            compile_driver(OURS, os.getcwd(), f"{folder}/ours")
            compile_driver(LLAMA2C, os.path.abspath(args.llama2c), f"{folder}/theirs")
            call("gcc", "-O3", f"{args.llama2c}/run.c", "-o", f"{folder}/run", "-lm")
            hf = compare(checkpoint, folder)
            if args.converter:
                compare_llamacpp(checkpoint, hf, args.converter, folder)
    return summary()


if __name__ == "__main__":
    main(run)
