/*
finite.h: --check-finite on, for train_gpas.c, which includes it before the model's passes.

The first operation whose result holds a number that is not finite ends the program, by its name.
The model calls these functions at places where the results of the last few operations still lie in
memory. They look at them in the order in which they were computed. Where a second operation works
in place on the result of the first, the first is repeated to see which of the two it was.
*/

static int all_finite(const float *x, size_t n) {
    int bad = 0;
    #pragma omp simd reduction(| : bad)
    for (size_t i = 0; i < n; i++) bad |= !isfinite(x[i]);
    return !bad;
}

// x (n) is the operation's result; s the sublayer 0 .. 2L-1, or -1 for the network's ends.
static void check_result(int s, const char *operation, const float *x, size_t n) {
    char where[64] = "";
    size_t i = 0;
    if (!x || all_finite(x, n)) return;
    while (isfinite(x[i])) i++;
    if (s >= 0)
        snprintf(where, sizeof where, " of layer %d, %s", s / 2 + 1,
                 s % 2 ? "feed-forward" : "attention");
    die("step %d: not finite: number %zu of %zu that %s%s computed is %g; no checkpoint has it",
        step_now, i + 1, n, operation, where, (double)x[i]);
}

// After sublayer_forward() of sublayer s.
static void check_forward(const Model *m, int s, int B, int T) {
    const Options *o = m->o;
    const Sublayer *a = &m->sublayers[s];
    LayerParameters w = layer_parameters(m, m->parameters, s / 2);
    int C = o->channels, H = o->hidden, last = norm_comes_last(o, s / 2), attention = s % 2 == 0;
    size_t N = (size_t)B * T, n = N * C;
    if (s == 0) check_result(-1, "embedding_forward", m->embedded, n);
    if (!last) check_result(s, "rmsnorm_forward", a->rstd, N);
    if (!last) check_result(s, "rmsnorm_forward", a->normed, n);
    if (attention && !all_finite(a->qkv, 3 * n)) {
        matmul_forward(a->qkv, a->normed, w.wqkv, (int)N, C, 3 * C);
        check_result(s, "matmul_forward (wq, wk, wv)", a->qkv, 3 * n);
        rope_forward(a->qkv, m->rope_table, B, T, C, C / o->heads);
        check_result(s, "rope_forward", a->qkv, 3 * n);
    }
    if (attention) check_result(s, "attention_forward", a->lse, N * o->heads);
    else check_result(s, "matmul_forward (w1, w3)", a->pre_act, 2 * N * H);
    check_result(s, attention ? "attention_forward" : "swiglu_forward", a->inner,
                 N * (attention ? C : H));
    check_result(s, attention ? "matmul_forward (wo)" : "matmul_forward (w2)", a->branch, n);
    if (has_branch_norm(o)) check_result(s, "rmsnorm_forward (branch)", m->scratch, n);
    if (last && o->gpas) check_result(s, "gpas_forward", m->scratch, n);
    check_result(s, "residual_forward", a->sum, n);
    if (last) check_result(s, "rmsnorm_forward", a->out, n);
    else check_result(s, "gpas_forward", a->out, n);  // without GPAS it is the sum
}

// At the end of model_forward().
static void check_logits(const Model *m, int with_loss, size_t N) {
    check_result(-1, "rmsnorm_forward (final)", m->final_normed, N * m->o->channels);
    check_result(-1, "matmul_forward (output)", m->logits, N * m->o->vocab_size);
    if (with_loss) check_result(-1, "crossentropy_forward", m->losses, N);
}

// In model_backward(), before the first sublayer.
static void check_head_backward(const Model *m, size_t N) {
    size_t C = m->o->channels, V = m->o->vocab_size, output = m->num_parameters - V * C;
    check_result(-1, "crossentropy_backward", m->logits, N * V);
    check_result(-1, "matmul_backward (output)", m->dinp, N * C);
    check_result(-1, "matmul_backward (output)", m->gradients + output, V * C);
    check_result(-1, "rmsnorm_backward (final)", m->dx, N * C);
    check_result(-1, "rmsnorm_backward (final)", m->gradients + output - C, C);
}

// In sublayer_backward(), before the branch, which is given dout: what came before it.
static void check_before_branch(const Model *m, const Sublayer *a, const float *dout, int B,
                                int T) {
    const Options *o = m->o;
    int s = (int)(a - m->sublayers), last = norm_comes_last(o, s / 2);
    size_t C = o->channels, n = (size_t)B * T * C;
    LayerParameters d = layer_parameters(m, m->gradients, s / 2);
    float *gate = layer_parameters(m, m->parameters, s / 2).gate;
    const char *norm = last ? "rmsnorm_backward" : "rmsnorm_backward (branch)";
    if (!last) check_result(s, "gpas_backward", m->dx, n);
    if (!last) check_result(s, "gpas_backward", d.gate, 1);
    check_result(s, norm, dout, n);
    check_result(s, norm, last ? d.norm[s % 2] : d.branch_norm[s % 2], C);
    if (last && !all_finite(m->dx, n)) {
        residual_backward(m->dx, dout, shortcut_scale(o), n);
        check_result(s, "residual_backward", m->dx, n);
        gpas_backward(m->dx, NULL, m->dx, a->inp, *gate, o->gate_act, o->stop_grad, n);
    }
    check_result(s, "gpas_backward", m->dx, n);
    check_result(s, "gpas_backward", d.gate, 1);
}

// After sublayer_backward() of sublayer s: the branch, and what came after it.
static void check_backward(const Model *m, int s, int B, int T) {
    const Options *o = m->o;
    const Sublayer *a = &m->sublayers[s];
    LayerParameters d = layer_parameters(m, m->gradients, s / 2);
    size_t C = o->channels, H = o->hidden, N = (size_t)B * T;
    if (s % 2 == 0) {
        check_result(s, "matmul_backward (wo)", m->dinner, N * C);
        check_result(s, "matmul_backward (wo)", d.wo, C * C);
        if (!all_finite(m->dwide, 3 * N * C)) {
            attention_backward(m->dwide, m->dinner, a->inner, a->lse, a->qkv, B, T, (int)C,
                               o->heads);
            check_result(s, "attention_backward", m->dwide, 3 * N * C);
            rope_backward(m->dwide, m->rope_table, B, T, (int)C, (int)C / o->heads);
        }
        check_result(s, "rope_backward", m->dwide, 3 * N * C);
    } else {
        check_result(s, "matmul_backward (w2)", m->dinner, N * H);
        check_result(s, "matmul_backward (w2)", d.w2, C * H);
        check_result(s, "swiglu_backward", m->dwide, 2 * N * H);
    }
    const char *product = s % 2 ? "matmul_backward (w1, w3)" : "matmul_backward (wq, wk, wv)";
    check_result(s, product, m->dinp, N * C);
    check_result(s, product, s % 2 ? d.w13 : d.wqkv, s % 2 ? 2 * H * C : 3 * C * C);
    if (!norm_comes_last(o, s / 2)) {
        check_result(s, "rmsnorm_backward", m->scratch, N * C);
        check_result(s, "rmsnorm_backward", d.norm[s % 2], C);
    }
    check_result(s, "residual_forward (of the gradients)", m->dx, N * C);
}
