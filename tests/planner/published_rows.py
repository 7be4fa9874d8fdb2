"""Rows of published, measured runs as tables of them hold them: each names its source."""

BRIDGE = {
    "id": "bridge-26.06.01",
    "source": "NVIDIA Megatron-Bridge performance summary, NeMo 26.06.01",
    "source_ref": "NVIDIA-NeMo/Megatron-Bridge/docs/performance-summary-archive.md",
    "model": "GPT-OSS-120B", "gpu": "GB200", "num_gpus": "64", "gpus_per_node": "72", "precision": "fp8-mx",
    "seq_len": "4096", "gbs": "1280", "mbs": "4", "tp": "1", "pp": "1", "vpp": "1", "cp": "1", "ep": "64", "etp": "1",
    "dp_type": "dist-opt", "sequence_parallel": "no", "recompute": "none", "cuda_graphs": "full_iteration",
    "dispatcher": "hybridep", "a2a_overlap": "yes", "offload": "none",
    "other": "rank_capacity_factor=1.5; paged_stash=True; delay_wgrad=True; hybridep_sms=32; fp8_attention=True; "
    "force-balanced routing, dropless; mock data",
    "notes": "tokens/s/GPU is quantised to a whole number of global samples/s; use tflops for timing",
    "measured_step_s": "6.31",
}  # fmt: skip
FOLDING = {
    "id": "folding",
    "source": "MoE Parallel Folding (NVIDIA, Apr 2025; Eos H100, PyTorch 2.5, token drop CF=1, BF16)",
    "source_ref": "arXiv:2504.14960 table 3",
    "model": "Mixtral-8x22B", "gpu": "H100", "num_gpus": "128", "gpus_per_node": "8", "precision": "bf16",
    "seq_len": "4096", "gbs": "256", "tp": "8", "pp": "1", "cp": "1", "ep": "1", "etp": "8", "dp_type": "fsdp",
    "sequence_parallel": "yes", "other": "method=FSDP; token drop, capacity factor 1",
    "notes": "without folding ETP equals TP",
}  # fmt: skip
DGXC = {
    "id": "dgxc-24.11.1",
    "source": "NVIDIA DGX Cloud benchmarking recipes NeMo 24.09/24.11",
    "source_ref": "NVIDIA/dgxc-benchmarking/grok1/README_314b.md@v24.11.1",
    "model": "Grok-1-314B-4L-proxy", "gpu": "H100", "num_gpus": "16", "gpus_per_node": "8", "precision": "fp8",
    "seq_len": "4096", "gbs": "1024", "mbs": "1", "tp": "4", "pp": "1", "vpp": "1", "cp": "1", "ep": "4",
    "dp_type": "dist-opt", "sequence_parallel": "yes",
    "other": "dispatcher and overlap not stated; routing not stated; layers=4",
}  # fmt: skip
MLPERF = {
    "id": "mlperf-5.0",
    "source": "MLPerf Training v5.0 results, submitter IBM+CoreWeave+NVIDIA",
    "source_ref": "mlcommons/training_results_v5.0/IBM+CoreWeave+NVIDIA/results/carina_ngpu2048_ngc25.04_nemo",
    "model": "Llama3.1-405B", "gpu": "GB200", "num_gpus": "2048", "gpus_per_node": "72", "precision": "fp8",
    "seq_len": "8192", "gbs": "1280", "mbs": "1", "tp": "4", "pp": "8", "vpp": "8", "cp": "2", "dp_type": "dist-opt",
    "sequence_parallel": "yes", "cuda_graphs": "full_iteration",
    "other": "real C4 data; TP_COMM_OVERLAP=True; ASYM_PP_EMBED=True; ASYM_PP_LOSS=True",
}  # fmt: skip
SIMUMAX = {
    "id": "simumax-1.2",
    "source": "SimuMax v1.2 B200 release validation (2026-05; measured columns)",
    "source_ref": "MooreThreads/SimuMax/docs/b200/b200_release_v1.2_summary.json",
    "model": "Llama3-70B-12L-proxy", "gpu": "B200", "num_gpus": "8", "gpus_per_node": "8", "precision": "bf16",
    "seq_len": "4096", "gbs": "16", "mbs": "1", "tp": "1", "pp": "2", "vpp": "1", "cp": "1", "ep": "1", "etp": "1",
    "dp_type": "dist-opt", "sequence_parallel": "no", "recompute": "none", "cuda_graphs": "none", "a2a_overlap": "no",
    "offload": "none",
    "other": "layers=12; dp=4; micro-batches=4; grads reduced in FP32; no overlap (grad, param, p2p, tp); mock data",
}  # fmt: skip
TITAN = {
    "id": "titan",
    "source": "torchtitan benchmarks, Dec 2024 (H100 96GB HBM2e 500W, Grand Teton, RDMA 400 Gb/s per GPU)",
    "source_ref": "pytorch/torchtitan/benchmarks/llama3_h100_202412_torchtitan.md",
    "model": "Llama3.1-8B", "gpu": "H100", "num_gpus": "8", "gpus_per_node": "8", "precision": "bf16",
    "seq_len": "8192", "gbs": "16", "mbs": "2", "tp": "1", "pp": "1", "vpp": "1", "cp": "1", "dp_type": "fsdp",
    "sequence_parallel": "no", "recompute": "selective (op-level)", "cuda_graphs": "none",
    "other": "FSDP 8; local batch 2; eager",
}  # fmt: skip
PAXML = {
    "id": "paxml",
    "source": "NVIDIA DGX Cloud benchmarking recipes release 25.02",
    "source_ref": "NVIDIA/dgxc-benchmarking",
    "model": "GPT-3-175B", "gpu": "H100", "num_gpus": "128", "gpus_per_node": "8", "precision": "bf16",
    "seq_len": "2048", "gbs": "512", "mbs": "4", "other": "framework=PaxML; fsdp=128",
}  # fmt: skip
SWIFT = {
    "id": "swift",
    "source": "ms-swift example script header (measured by the authors)",
    "source_ref": "modelscope/ms-swift/examples/train/megatron/qwen3_moe.sh@717272a96 (2025-04-29)",
    "model": "Qwen3-30B-A3B", "gpu": "A800", "num_gpus": "16", "gpus_per_node": "8", "precision": "bf16",
    "seq_len": "8192", "gbs": "16", "mbs": "1", "tp": "2", "pp": "1", "vpp": "1", "cp": "1", "ep": "8", "etp": "2",
    "dp_type": "dist-opt", "sequence_parallel": "yes", "recompute": "full", "cuda_graphs": "none",
    "dispatcher": "alltoall", "a2a_overlap": "no", "offload": "none", "other": "task=sft; packing",
    "notes": "real SFT data packed to the stated length; routing not forced",
}  # fmt: skip
LORA = {
    "id": "mlperf-lora-5.0",
    "source": "MLPerf Training v5.0 results, submitter MangoBoost",
    "source_ref": "mlcommons/training_results_v5.0/MangoBoost/results/MI300X-LLMBoost-GPUBoost-4node/llama2_70b_lora",
    "model": "Llama2-70B", "gpu": "MI300X", "num_gpus": "32", "gpus_per_node": "8", "precision": "fp8",
    "seq_len": "8192", "gbs": "8", "mbs": "1",
    "other": "task=lora (rank 16, attention); packed real data; gradient accumulation 1",
}  # fmt: skip
UNSTATED = {
    "id": "mcore-0.8",
    "source": "Megatron-LM core/transformer/moe README, MCore v0.8",
    "source_ref": "NVIDIA/Megatron-LM/megatron/core/transformer/moe/README.md",
    "model": "Mixtral-8x7B", "gpu": "H100", "gpus_per_node": "8", "precision": "bf16", "seq_len": "4096",
    "notes": "throughput quoted in text without the full degrees",
}  # fmt: skip

ROWS = [BRIDGE, FOLDING, DGXC, MLPERF, SIMUMAX, TITAN, PAXML, SWIFT, LORA, UNSTATED]
