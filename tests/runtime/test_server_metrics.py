"""The metrics contract: vLLM's names, which pickers and autoscalers read, and our own; one registry on two ports."""

import asyncio
import re
from pathlib import Path

from tests.runtime.serving.engine import MODEL, ScriptedEngine
from tests.runtime.serving.process import serving

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
VLLM_SAMPLES = (
    "vllm:num_requests_waiting",
    "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:time_to_first_token_seconds_count",
    "vllm:time_per_output_token_seconds_count",
    "vllm:e2e_request_latency_seconds_count",
)


def test_vllm_names_carry_the_values_of_the_run() -> None:
    async def scenario() -> None:
        async with serving(ScriptedEngine()) as served:
            for _ in range(3):
                await served.complete(max_tokens=4)
            metrics = await served.metrics()
            values = [metrics[f'{name}{{model_name="{MODEL}"}}'] for name in VLLM_SAMPLES]
            assert values == [0, 0, 0, 0, 0, 15, 12, 3, 3, 3]
            assert metrics[f'vllm:prefix_cache_queries_total{{model_name="{MODEL}"}}'] == 50
            assert metrics[f'vllm:prefix_cache_hits_total{{model_name="{MODEL}"}}'] == 32
            assert metrics['vllm:cache_config_info{block_size="16",num_gpu_blocks="128"}'] == 1

    asyncio.run(scenario())


def test_prism_names_carry_the_values_of_the_run() -> None:
    async def scenario() -> None:
        async with serving(ScriptedEngine(), boot_point="b500") as served:
            await served.complete(max_tokens=4)
            metrics = await served.metrics()
            expected = {
                'prism_runtime_tokens_total{class="default",point="b500"}': 4,
                'prism_runtime_requests_total{class="default",outcome="met"}': 1,
                'prism_runtime_requests_total{class="default",outcome="missed"}': 0,
                'prism_runtime_requests_total{class="default",outcome="shed"}': 0,
                'prism_runtime_requests_total{class="default",outcome="cancelled"}': 0,
                'prism_runtime_budget_ratio{class="default"}': 0.5,
                'prism_runtime_relative_quality_ratio{class="default"}': 0.97,
                'prism_runtime_operating_point{class="default",point="b500"}': 1,
                'prism_runtime_ttft_seconds_count{class="default"}': 1,
                'prism_runtime_tpot_seconds_count{class="default"}': 1,
                "prism_runtime_switch_duration_seconds_count": 0,
                "prism_runtime_directive_epoch": 0,
                "prism_runtime_directive_sequence": 0,
                "prism_runtime_directive_age_seconds": 0,
                "prism_runtime_envelope_ttl_seconds": 0,
                'prism_runtime_envelope_state{state="Unmanaged"}': 1,
                "prism_runtime_steps_total": 4,
                'prism_runtime_kv_blocks{state="used"}': 0,
                'prism_runtime_kv_blocks{state="kept"}': 3,
                'prism_runtime_kv_blocks{state="free"}': 125,
            }
            assert {name: metrics.get(name) for name in expected} == expected

    asyncio.run(scenario())


def test_drift_of_thresholds_is_told_for_each_point_and_not_guessed_before_it_is_known() -> None:
    async def scenario() -> None:
        async with serving(ScriptedEngine()) as served:
            metrics = await served.metrics()
            prefix = "prism_runtime_point"
            assert metrics[f'{prefix}_nominal_budget_ratio{{point="b500"}}'] == 0.5
            assert metrics[f'{prefix}_realised_budget_ratio{{point="b500"}}'] == 0.515
            assert metrics[f'{prefix}_threshold_shift{{point="b500"}}'] == 0.09
            assert metrics[f'{prefix}_shift_at_limit{{point="b500"}}'] == 0
            assert f'{prefix}_realised_budget_ratio{{point="b750"}}' not in metrics

    asyncio.run(scenario())


def test_the_page_on_metrics_names_every_family_and_no_other() -> None:
    async def scenario() -> None:
        async with serving(ScriptedEngine()) as served:
            await served.complete()
            async with served.http.get(f"http://127.0.0.1:{served.ports['metrics_port']}/metrics") as response:
                text = await response.text()
        exposed = set(re.findall(r"^# TYPE ((?:prism|vllm)\S+) ", text, re.MULTILINE))
        documented = set(re.findall(r"`((?:prism|vllm:)[a-z0-9]*_[a-z0-9_]+)`", PAGE.read_text()))
        assert {name for name in exposed if not name.endswith("_created")} <= documented
        assert {name for name in documented if "lag" not in name} <= exposed, "lag is told by paced pods alone"

    asyncio.run(scenario())


def test_metrics_port_serves_the_same_registry_and_nothing_else() -> None:
    async def scenario() -> None:
        async with serving(ScriptedEngine()) as served:
            await served.complete()
            url = f"http://127.0.0.1:{served.ports['metrics_port']}"
            async with served.http.get(url + "/metrics") as response:
                assert "prism_runtime_tokens_total" in await response.text()
            async with served.http.post(url + "/v1/completions", json={}) as response:
                assert response.status == 404

    asyncio.run(scenario())
