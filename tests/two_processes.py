"""One step of examples/trl_cme.py on completions that are given, for each size of a group: its averaged gradient, to a file. Run by test_examples.py, on one process and on two, which torchrun would start anew: here the second is forked off the first."""
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from examples import trl_cme  # noqa: E402
from plumbing import models  # noqa: E402

PROMPTS = ["Tell me about Mia.", "Describe Rosa."]  # 2 groups of 4: on two processes a group each; and 1 of 8, cut in two


def given(prompts, trainer):
    """Of row i of the whole batch the i-th sentence, cut at another length each."""
    tokenizer, first = trainer.processing_class, trainer.accelerator.process_index * len(prompts)
    ids = []
    for i, prompt in enumerate(prompts, first):
        words = "Mia keeps a dog and lives in Prague. Rosa loves the colour golden and likes rice.".split()
        ids.append(tokenizer(" ".join(words[i % 5:i % 5 + 4 + i]), add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * (i % 2))
    return {"prompt_ids": [models.chat_ids(tokenizer, p) for p in prompts], "completion_ids": ids, "logprobs": None}


class Keep(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if args.process_index == 0:
            torch.save({name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}, sys.argv[1] + str(args.num_generations))


def step(group: int):
    processes = int(os.environ.get("WORLD_SIZE", 1))
    policy, tokenizer = models.load("generator", f"{ROOT}/toy/cme/generator", "cpu", train=True)
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": p}]} for p in PROMPTS])
    config = GRPOConfig(output_dir=sys.argv[1] + ".run", max_steps=1, num_generations=group, per_device_train_batch_size=8 // processes, max_completion_length=24,
                        learning_rate=0.0, max_grad_norm=0.0, beta=0.02, loss_type="grpo", temperature=1.0, use_cpu=True, bf16=False, gradient_checkpointing=False,
                        report_to=[], save_strategy="no", disable_tqdm=True, shuffle_dataset=False)
    verifier = models.load("verifier", f"{ROOT}/toy/cme/verifier", "cpu")
    trl_cme.CMETrainer(policy, args=config, processing_class=tokenizer, train_dataset=rows, verifier=verifier, rollout_func=given, callbacks=[Keep()]).train()
    assert processes == 1 or torch.distributed.get_world_size() == processes


def main():
    if sys.argv[1].endswith("two"):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.setpgid(0, 0)                               # where one fails, the other does not wait for it
        rank = str(int(os.fork() == 0))
        torch.set_num_threads(1)                       # as in test_train.fork
        os.environ.update(RANK=rank, LOCAL_RANK=rank)
    try:
        for group in (4, 8):
            step(group)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    except BaseException:
        traceback.print_exc(), sys.stderr.flush()
        os.killpg(0, signal.SIGKILL)
    finally:
        if os.environ.get("RANK") == "1":
            os._exit(0)                                # no teardown: gloo's threads now and then abort a process that has done its work
