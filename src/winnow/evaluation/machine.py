"""Constants of latency measurements, without torch: forecasts read them too."""

READ = 1 << 28  # bytes read to measure the bandwidth: more than caches hold
ENGINE = "transformers"  # in which models run if nothing else is asked for
