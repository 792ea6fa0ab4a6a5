"""Hugging Face folders to Megatron checkpoints and back, tensor by tensor, through the one weight mapping.

options.py          the command line of `genac convert`, `genac inspect` and the two scripts in tools/
to_hf.py            a checkpoint's role -> a Hugging Face folder
to_megatron.py      a Hugging Face folder -> a checkpoint
job.py              shard by shard: resumable, over processes or ranks, a folder that appears whole
units.py            what is moved at a time: one Megatron parameter
stored.py           a checkpoint's tensors, read and written without a world
safetensors_file.py a safetensors file, written tensor by tensor
assets.py           config, generation config, tokenizer, chat template
verify.py           logits of both sides
inspect.py          what is in a checkpoint
"""
