/* The functions that Python calls, for REAL and SUFFIX. Those that take a `job` return 1 if they get
 * no memory. */

/* Runs a pass over all parts. */
static int F(run)(pass part, job *j) {
    if (j->x_format != NATIVE) {
        j->row_blocks = malloc(((size_t)j->parts * j->K + 1) * sizeof(REAL));
        if (!j->row_blocks) return 1;
    }
    for_parts(part, j);
    free(j->row_blocks);
    return 0;
}

/* Counts and sums of losses of all parts, without the ignored samples'. */
static int F(run_regions)(pass part, job *j) {
    j->tallies = calloc((size_t)j->parts * (j->regions + 1) * COPIES, sizeof *j->tallies);
    int failed = !j->tallies || F(run)(part, j);
    for (int32_t k = 0; !failed && k < j->regions; k++) {
        tally sum = {0, 0};
        for (int at = 0; at < j->parts; at++)
            for (int copy = 0; copy < COPIES; copy++) sum += tallies_of(j, at)[k * COPIES + copy];
        j->counts[k] = (int64_t)sum[0];
        j->losses[k] = sum[1];
    }
    free(j->tallies);
    return failed;
}

static int F(run_grad)(pass part, job *j) {
    size_t size = j->x_format == NATIVE ? sizeof(REAL) : sizeof(uint16_t);
    REAL *table = calloc((size_t)(j->regions < TABLE ? TABLE : j->regions + 1), sizeof *table);
    for (int32_t k = 0; table && k < j->regions; k++) table[k] = (REAL)(j->weights[k] * j->scale);
    before_writing(j->out, j->rows * j->K * size);
    j->table = table;
    int failed = !table || F(run)(part, j);
    free(table);
    return failed;
}

int F(sigmoid_regions)(job *j) { return F(run_regions)(F(sigmoid_regions_part), j); }
int F(softmax_regions)(job *j) { return F(run_regions)(F(softmax_regions_part), j); }
int F(asl1_regions)(job *j) { return F(run_regions)(F(asl1_regions_part), j); }
int F(focal_regions)(job *j) { return F(run_regions)(F(focal_regions_part), j); }
int F(sigmoid_grad)(job *j) { return F(run_grad)(F(sigmoid_grad_part), j); }
int F(softmax_grad)(job *j) { return F(run_grad)(F(softmax_grad_part), j); }
int F(asl1_grad)(job *j) { return F(run_grad)(F(asl1_grad_part), j); }
int F(focal_grad)(job *j) { return F(run_grad)(F(focal_grad_part), j); }
int F(asl1_sizes)(job *j) { return F(run)(F(asl1_sizes_part), j); } /* one part: it adds to counts */

/* `reference.quantile` of a histogram (SIZES,) of sizes. */
double F(quantile)(const REAL *histogram, double quantile, double start) {
    double total = 0, below = 0;
    int k = 0;
    for (int i = 0; i < SIZES; i++) total += histogram[i];
    if (!(total > 0)) return start;
    while (k < SIZES - 1 && below + histogram[k] < quantile * total) below += histogram[k++];
    double part = histogram[k] > 0 ? (quantile * total - below) / histogram[k] : 0;
    return exp2(-16 + (k + (part < 1 ? part : 1)) / 4);
}

/* c, from averages of the foreground samples and of 1, which it moves on. */
static double F(prior_count)(double foreground, REAL *average, double prior, double momentum,
                             int32_t from_first, int32_t debias, int32_t training) {
    double mean = average[0], seen = average[1];
    if (momentum > 0 && training) {
        double keep = from_first && seen == 0 ? 0 : momentum;
        average[0] = (REAL)(mean = keep * mean + (1 - keep) * foreground);
        average[1] = (REAL)(seen = keep * seen + (1 - keep));
    }
    if (momentum > 0 && seen > 0) foreground = mean / (debias ? seen : 1);
    return prior * (foreground > 1 ? foreground : 1);
}

/* S_k + c of one region after each of `levels` rows of counts, (levels, bins) with region k first;
 * its average and its number of updates move on. */
static void F(region_density)(const int64_t *counts, int64_t levels, int64_t bins, REAL *ema,
                              int64_t *updates, double c, double momentum, int32_t from_first,
                              int32_t debias, int32_t training, int32_t moves,
                              double *density) {
    double average = *ema;
    int64_t times = *updates;
    for (int64_t level = 0; level < levels; level++) {
        double new = (double)counts[level * bins], smooth = new;
        if (momentum > 0 && training && (moves || new > 0)) {
            average = from_first && times == 0 ? new : momentum * average + (1 - momentum) * new;
            times++;
        }
        if (momentum > 0 && times) /* else a region first met in evaluation */
            smooth = average / (debias ? -expm1((double)times * log(momentum)) : 1);
        density[level * bins] = smooth + c;
    }
    if (training) *ema = (REAL)average, *updates = times;
}

/* counts, weights (levels, bins): `reference.update_density`, whose arguments these are.
 * ema, updates (rows, bins), foreground (rows,) and its average (rows, 2): a row for each level
 * where `own`, else one for all; the last two are not read without a prior. `normalizer`: 0
 * valid_bins, 1 bins, 2 weights. */
void F(density)(const int64_t *counts, int64_t levels, int64_t bins, REAL *ema, int64_t *updates,
                const int64_t *foreground, REAL *ema_foreground, double prior, double momentum,
                int32_t own, int32_t normalizer, int32_t from_first, int32_t debias,
                int32_t training, double factor, double *weights) {
    for (int64_t row = 0; row < (own ? levels : 1); row++) {
        int64_t at = row * bins, rows = own ? 1 : levels;
        double c = 0;
        if (prior > 0)
            c = F(prior_count)((double)foreground[row], ema_foreground + 2 * row, prior, momentum,
                               from_first, debias, training);
        for (int64_t k = at; k < at + bins; k++)
            F(region_density)(counts + k, rows, bins, ema + k, updates + k, c, momentum, from_first,
                              debias, training, prior > 0, weights + k);
    }
    for (int64_t level = 0; level < levels; level++, counts += bins, weights += bins) {
        double total = 0;
        for (int64_t k = 0; k < bins; k++)
            if (normalizer == 1)
                total++;
            else if (counts[k] > 0)
                total += normalizer == 0 ? 1 : (double)counts[k] / weights[k];
        for (int64_t k = 0; k < bins; k++)
            weights[k] = counts[k] > 0 ? factor / (total * weights[k]) : 0;
    }
}
