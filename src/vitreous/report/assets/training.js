// Numbers of training by epoch and by update, and what lines of several runs look like.

const colored = (series, ordered) =>
  series.map((s, i) => ({
    ...s,
    look: "line",
    knots: s.points.length < 16,
    color: lineColor(i, series.length, ordered),
  }));

/** The score on a test set after an epoch as it is shown, parts of 1 in percent, or null. */
function score(metric, metrics, test) {
  const value = own(own(metrics?.tests, test), metric.name) ?? null;
  return value === null || metric.unit !== "%" ? value : 100 * value;
}

/** What the runs are scored by: {id, metric, test} of test sets and of metrics, or the first alone; each once. */
function scoresOf(runs, first = false) {
  const all = runs.flatMap((run) =>
    run.metrics.flatMap((m) =>
      Object.keys(m.tests || {}).flatMap((test) =>
        run.scores
          .filter((metric, i) => !(first && i) && m.tests[test] && Object.hasOwn(m.tests[test], metric.name))
          .map((metric) => [`${metric.name}-${test}`, { metric, test }]),
      ),
    ),
  );
  return [...new Map(all)].map(([id, one]) => ({ id, ...one }));
}

/** Loss, scores, learning rate and gradient norm, one line per run. */
function trainingCharts() {
  const runs = DATA.sources.filter((source) => source.metrics.length);
  if (!runs.length) return [];
  const byEpoch = (id, title, unit, value) => {
    const lines = runs.map((run) => ({
      name: run.name,
      points: run.metrics.map((m) => ({ x: m.epoch, y: value(m) ?? null })),
    }));
    if (!lines.some((line) => line.points.some((point) => point.y !== null))) return null;
    return chart({ id, title, unit, xLabel: "epoch", series: colored(lines) });
  };
  const steps = runs.filter((run) => run.loss.length);
  return [
    byEpoch("loss", "Training loss", "", (m) => m.losses?.total),
    steps.length
      ? chart({
          id: "loss-by-update",
          title: "Training loss, by update",
          xLabel: "update",
          series: colored(steps.map((run) => ({ name: run.name, points: run.loss.map(([x, y]) => ({ x, y })) }))),
        })
      : null,
    ...scoresOf(runs).map(({ id, metric, test }) =>
      byEpoch(id, `${capital(metric.label)}, ${test}`, metric.unit, (m) => score(metric, m, test)),
    ),
    byEpoch("learning-rate", "Learning rate", "", (m) => m.lr),
    byEpoch("gradient-norm", "Gradient norm", "", (m) => m.gradients?.total),
  ].filter(Boolean);
}
