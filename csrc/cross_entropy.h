/* cross_entropy.h: the rows of cross_entropy, which linear_cross_entropy runs chunk by chunk. */
#ifndef FLATOUT_CROSS_ENTROPY_H
#define FLATOUT_CROSS_ENTROPY_H

#include "cpu.h"

/* What all rows of one call share. */
typedef struct {
    const Tensor *target, *class_weight;
    const LossOptions *options;
    int64_t V, count;  /* count: rows not ignored */
    double weight_sum; /* sum over those rows of their label's class weight */
    double class_sum;  /* sum of all class weights */
    double scale;      /* d loss / d the first two terms of a row's loss */
    double z_scale;    /* d loss / d its z term */
} Scoring;

/* Checks every label. */
const char *CPU(scoring)(Scoring *s, const Tensor *target, const Tensor *class_weight,
                         const Tensor *num_items, const LossOptions *options, int64_t N, int64_t V);

/* Rows n0 .. n0 + n of the call, whose logits are rows 0 .. n: losses, lse, and dlogits for
 * dloss = 1; lse_low, predicted and dlogits each or NULL. Returns how many of them predict their
 * label, if `largest`, which predicted needs. */
int64_t CPU(score_rows)(const Scoring *s, const Tensor *logits, const Tensor *dlogits, int64_t n0,
                        int64_t n, Tensor *losses, Tensor *lse, Tensor *lse_low, Tensor *predicted,
                        bool largest);

/* dlogits of the same rows for any dloss and dlse. lse is computed anew: rounded to float, as the
 * forward saved it, it would spoil p_y - 1 where a row is confident of its label. */
void CPU(gradient_rows)(const Scoring *s, const Tensor *dlogits, const Tensor *logits, int64_t n0,
                        int64_t n, const Tensor *dloss, const Tensor *dlse);

/* loss and accuracy, from the rows' losses. */
void CPU(reduce_losses)(const Scoring *s, Tensor *loss, Tensor *accuracy, const Tensor *losses,
                        const Tensor *lse, int64_t correct);

#endif
