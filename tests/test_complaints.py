"""What users of other trainers have complained of, and the tests that hold it here: the table, and
that every test in it is there.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
HELD = {
    "Megatron-LM 5844, 5845: a converter that matched no expert, and a model of random ones": (
        "train/test_pretrained_folders.py::test_names_are_held_against_config_json_in_both_directions",
        "train/test_pretrained.py::test_logits_and_gradients_are_those_of_transformers",
    ),
    "Pai-Megatron-Patch 605, Megatron-Bridge 2381: equal weights, other outputs": (
        "train/test_pretrained.py::test_logits_and_gradients_are_those_of_transformers",
    ),
    "Megatron-Bridge 1783, ms-swift 5685, llm-foundry 463: out of memory while converting": (
        "train/test_reading_memory.py::test_reading_and_writing_hold_one_tensor_beside_the_model",
    ),
    "sglang 31213, 37133, Megatron-LM 1482: a selection bias that was rounded to bf16": (
        "train/test_pretrained_folders.py::"
        "test_a_selection_bias_keeps_its_digits_among_bf16_weights",
        "end_to_end/test_published_weights.py::"
        "test_a_selection_bias_near_seven_keeps_every_digit_through_training_in_bf16",
    ),
    "alpaca-lora 333, torchtune 945, unsloth 1404: no tokenizer, or another chat template": (
        "end_to_end/test_published_weights.py::"
        "test_a_folder_that_no_step_has_changed_comes_out_bit_for_bit",
    ),
    "Megatron-Bridge 1210: a round trip by hand, and other numbers": (
        "train/test_pretrained_folders.py::"
        "test_what_no_step_has_changed_comes_out_byte_for_byte_in_every_family",
        "end_to_end/test_published_weights.py::"
        "test_a_folder_that_no_step_has_changed_comes_out_bit_for_bit",
    ),
    "vllm 41384: adapters of stacked experts that are silently dropped": (
        "train/test_adapter_folders.py::test_peft_computes_what_the_run_computes",
    ),
    "axolotl 3515, TuFT 154: a pattern that matched no expert": (
        "model/test_lora.py::test_a_target_that_means_nothing_is_refused",
        "distributed/test_frozen.py::test_a_part_that_means_nothing_is_refused",
    ),
    "marin 7237, trl 4201: masks of zeros everywhere, and a run that looks healthy": (
        "train/test_chat.py::test_a_data_set_without_any_answer_is_refused",
        "train/test_chat.py::"
        "test_rows_that_cannot_be_learnt_from_are_counted_or_refused_with_their_place",
    ),
    "AutoModel 3739: an empty block of thoughts that is learnt": (
        "train/test_chat.py::"
        "test_the_header_of_an_answer_is_never_learnt_an_empty_block_of_thoughts_included",
    ),
    "transformers 34494: an answer that was cut loses its mask": (
        "train/test_chat.py::test_a_conversation_that_is_too_long_is_refused_or_cut_with_its_mask",
        "train/test_chat.py::test_every_turn_of_a_random_conversation_is_found_by_its_offsets",
    ),
    "torchtitan 2387, Megatron-LM 619: routers and norms that differ over tensor ranks": (
        "distributed/test_tensor_parallel.py::"
        "test_two_ranks_that_share_matrices_train_as_one_process",
        "distributed/test_tensor_parallel.py::"
        "test_four_ranks_that_share_matrices_train_as_one_process",
    ),
    "Megatron-LM 2217, 3768, 5047: a balance loss that follows tensor and context sizes": (
        "distributed/test_tensor_parallel.py::"
        "test_two_ranks_that_share_matrices_train_as_one_process",
        "distributed/test_context_parallel.py::test_two_ranks_that_share_rows_train_as_one_process",
    ),
    "verl 6609, DeepSpeed 5248: norms and gradients that grow with the ranks that share a row": (
        "distributed/test_context_parallel.py::test_two_ranks_that_share_rows_train_as_one_process",
        "distributed/test_context_parallel.py::"
        "test_four_ranks_that_share_rows_train_as_one_process",
    ),
    "DeepSpeed 7833: rows shared by heads that crash at ZeRO stage 0": (
        "distributed/test_context_parallel.py::"
        "test_four_ranks_that_share_rows_train_as_one_process",
    ),
    "verl 1226: no more ranks to a row than key/value heads": (
        "distributed/test_context_parallel.py::"
        "test_more_on_four_ranks_that_gather_trains_as_one_process",
        "end_to_end/test_context_parallel.py::"
        "test_ranks_that_gather_are_as_one_process_and_send_what_the_plan_says",
    ),
    "DeepSpeed 6714, 1522, torchtitan 1689: a stage without experts hangs, or stops the bias": (
        "distributed/test_pipeline_parallel.py::test_two_stages_train_as_one_process",
    ),
    "Megatron-LM 6616: a hang where stages order their groups of parameters differently": (
        "distributed/test_pipeline_parallel.py::test_two_stages_train_as_one_process",
    ),
    "megablocks 85: a balance loss that changes with the number of stages": (
        "distributed/test_pipeline_parallel.py::test_two_stages_train_as_one_process",
        "end_to_end/test_pipeline_parallel.py::test_stages_log_what_one_process_does",
    ),
    "pytorch 160285: gradients of experts that are doubled over two ranks": (
        "distributed/test_parity.py::test_two_ranks_train_as_one_process",
    ),
    "Megatron-LM 1517, KempnerForge 202: a checkpoint of one layout that another cannot read": (
        "end_to_end/test_pipeline_parallel.py::"
        "test_stages_resume_bit_for_bit_and_from_other_layouts",
        "end_to_end/test_pipeline_parallel.py::test_one_process_goes_on_where_stages_stopped",
    ),
    "pytorch 144530, 166577: a schedule that skips the hooks which reduce gradients": (
        "train/test_pipeline_schedule.py::"
        "test_every_micro_batch_makes_every_pass_once_and_nobody_waits_for_ever",
        "distributed/test_pipeline_parallel.py::"
        "test_what_is_refused_of_virtual_stages_would_be_wrong",
    ),
    "Megatron-DeepSpeed 151: experts, tensor parallelism and stages together": (
        "distributed/test_pipeline_parallel.py::"
        "test_stages_of_experts_and_shared_rows_train_as_one_process",
        "distributed/test_tensor_parallel.py::"
        "test_four_ranks_that_share_matrices_train_as_one_process",
    ),
    "DeepSpeed 8438: parameters that end in another optimizer than was asked for": (
        "train/test_groups.py::test_what_is_frozen_is_in_no_group_and_is_counted",
        "distributed/test_lora.py::test_adapters_are_trained_and_nothing_else_is",
    ),
}
"""Complaint -> tests that hold it."""


@pytest.mark.parametrize("complaint", HELD)
def test_every_complaint_has_its_tests(complaint):
    for place in HELD[complaint]:
        file, _, name = place.partition("::")
        tree = ast.parse((ROOT / file).read_text())
        found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in found, f"{place} is gone; which test holds it now?"
