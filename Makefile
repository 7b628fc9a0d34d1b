# `make check` is what to run before a commit; `make ci` is what CI runs.
.PHONY: check ci
check:
	launch/lint.sh
	launch/test.sh
ci:
	.ci/run
