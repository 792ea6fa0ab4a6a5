"""Build a role's model on its layout's ranks, ready for Megatron's pipeline schedules.

Interface in short:

    shape = shape_of(config.model, tokenizer_vocab)               # models.registry; Shape: families.base
    chunks = build_model(shape, layout, groups, config.training)  # list[RoleModel], one per virtual chunk;
                                                                  # call only where groups is not None
    load_hf_into(chunks, layout, shape, HfFolder(path).get)       # models.mapping / models.hf_folder
    load_hf_into(chunks, layout, shape, random_weights(shape, seed))   # ... or seeded random weights

    chunks[0].config                                              # the TransformerConfig, shared by chunks
    model.scoring.temperature, model.scoring.with_entropy         # set before a pass, on every chunk
    out = model(tokens_1T, positions_1T, None, labels=labels_1T, loss_mask=mask_1T,
                packed_seq_params=PackedSeqParams(qkv_format="thd", ...))

`model` may be wrapped (Float16Module, DistributedDataParallel). With labels, the last stage returns fp32
[1, T] (log-prob of each label) or, with_entropy, [2, T] (log-prob, entropy); where loss_mask is False both are
0. Earlier stages return hidden states, as the schedules want. Without labels the last stage returns logits
[1, T, padded vocab / tp]. T is a multiple of tp where sequence parallelism is on; cu_seqlens covers all T
positions (padding is a sequence of its own). Every micro-batch of a step has the same T where pp > 1: pass
seq_length=T, micro_batch_size=1 to the schedule.
"""
