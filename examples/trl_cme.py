"""Token-level CME in TRL's GRPOTrainer, for whoever outgrows one process or trains with TRL already (pip install trl).

    python examples/trl_cme.py                                      # the toy, on a CPU
    torchrun --standalone --nproc_per_node 2 examples/trl_cme.py    # the same on two processes
    accelerate launch examples/trl_cme.py Qwen/Qwen2.5-0.5B google/gemma-3-1b-it ultrafeedback 5000 runs/trl

TRL multiplies advantages of shape [B, T] into its loss as they are; here they are made of whole groups, gathered from all
processes.  KL and clipping are TRL's.  The other two rewards are ordinary reward functions: GRPOTrainer(reward_funcs=...)."""
import os
import sys

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import cat  # noqa: E402
import cme  # noqa: E402
import grpo  # noqa: E402
from plumbing import TOY, models  # noqa: E402
from plumbing.prompts import draw_prompts, messages_of, read_prompts  # noqa: E402


class CMETrainer(GRPOTrainer):  # verifier: (model, tokenizer), frozen
    def __init__(self, *args, verifier, **settings):
        self.verifier = verifier
        super().__init__(*args, reward_funcs=self.mean_reward, **settings)

    def mean_reward(self, prompts, completion_ids, **_):
        """Eq. 1; what TRL logs, and would have trained on, is the mean over the tokens that count."""
        ids, lengths = grpo.pad(completion_ids, self.accelerator.device)
        stop = models.find_stop_ids(self.accelerator.unwrap_model(self.model), self.processing_class)
        self.rewards, self.counted = cme.token_rewards(*self.verifier, self.processing_class, prompts, ids, lengths, stop_ids=stop)
        return (self.rewards.sum(1) / self.counted.sum(1)).tolist()

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        B, T = output["completion_ids"].shape
        rewards, counted = (torch.nn.functional.pad(x, (0, T - x.shape[1])) for x in (self.rewards, self.counted.float()))
        every = [self.accelerator.gather(self.accelerator.pad_across_processes(x, dim=1)) for x in (rewards, counted)]
        advantages = grpo.position_advantages(every[0], every[1].bool(), self.num_generations)
        first = self.accelerator.process_index * B
        return output | {"advantages": advantages[first:first + B, :T]}


def sequence_reward(verifier, verifier_tokenizer):
    """Eq. 3 as a reward function of TRL's."""
    def reward(prompts, completions, **_):
        texts = [y if isinstance(y, str) else y[0]["content"] for y in completions]
        return cme.sequence_rewards(verifier, verifier_tokenizer, prompts, texts).tolist()
    return reward


def rubric_reward(anchor, G: int, **settings):
    """CaT, Eq. 1, 3 and 4: the rows of a group stand together, and are all on one process.  anchor: a text model."""
    def reward(prompts, completions, **_):
        texts = [y if isinstance(y, str) else y[0]["content"] for y in completions]
        asked, groups = prompts[::G], [texts[i:i + G] for i in range(0, len(texts), G)]
        references = cat.synthesize(asked, groups, anchor, **settings)
        rubrics = cat.propose_rubrics(asked, references, anchor, max_new_tokens=512)
        return [None if x != x else x for x in cat.rubric_rewards(cat.judge_rubrics(groups, rubrics, anchor)).tolist()]
    return reward


def main(generator=f"{TOY}/cme/generator", verifier=f"{TOY}/cme/verifier", prompts=f"{TOY}/cme/prompts.jsonl", steps=40, output="runs/trl-cme"):
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"  # the verifier's too
    policy, tokenizer = models.load("generator", generator, device, train=True)
    rows = draw_prompts(read_prompts(prompts), tokenizer) if prompts == "ultrafeedback" else read_prompts(prompts)
    rows = Dataset.from_list([{"prompt": messages_of(row["prompt"])} for row in rows])
    toy, processes = generator.startswith(TOY), int(os.environ.get("WORLD_SIZE", 1))
    config = GRPOConfig(
        output_dir=output, max_steps=int(steps), num_generations=8, per_device_train_batch_size=128 // processes if toy else 8, max_completion_length=48 if toy else 1024,
        learning_rate=8e-4 if toy else 3e-6, beta=0.0 if toy else 0.01, warmup_steps=5 if toy else 20, lr_scheduler_type="cosine", loss_type="grpo", temperature=1.0,
        use_cpu=device == "cpu", bf16=device != "cpu", gradient_checkpointing=False, report_to=[], save_strategy="no", disable_tqdm=True)
    trainer = CMETrainer(policy, args=config, processing_class=tokenizer, train_dataset=rows, verifier=models.load("verifier", verifier, device))
    trainer.train(), trainer.save_model(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
