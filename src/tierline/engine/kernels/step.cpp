#include "step.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "gemm.h"
#include "lanes.h"
#include "threads.h"

namespace tl {
namespace {

constexpr int PASS_ROWS = 1024;          // longer steps go through the layers in several passes
constexpr int REDUNDANT_ROWS = 2;        // so few are normed by every thread, to save a barrier
constexpr int PAIR = 2 * PANEL;          // outputs: a panel of gate beside its panel of up
constexpr int PAIR_ROWS = 256;           // whose activations stay in the L2 cache
constexpr size_t PAIR_BYTES = 64 << 10;  // gate and up values waiting for their product

// Mathematics of rows, in whole lanes: every width is a multiple of 16.

void add_row(float* x, const float* y, int n) {
    for (int i = 0; i < n; i += 16) store(x + i, load(x + i) + load(y + i));
}

// out = x / rms(x) * weight
void norm_row(const float* x, const float* weight, int n, float eps, float* out) {
    Lanes squares = zeros();
    for (int i = 0; i < n; i += 16) squares = fma(load(x + i), load(x + i), squares);
    Lanes factor = all(1.0f / std::sqrt(sum(squares) / float(n) + eps));
    for (int i = 0; i < n; i += 16) store(out + i, load(x + i) * factor * load(weight + i));
}

// Dimension i turns with dimension i + half, or 2i with 2i + 1.  angles: cosines, then sines.
void rotate(float* head, const float* angles, const Rope& rope) {
    const int half = rope.count, step = rope.interleaved ? 2 : 1,
              apart = rope.interleaved ? 1 : half;
    for (int i = 0; i < half; ++i) {
        float &first = head[i * step], &second = head[i * step + apart];
        const float a = first, b = second, cosine = angles[i], sine = angles[half + i];
        first = a * cosine - b * sine;
        second = b * cosine + a * sine;
    }
}

template <class Out>
void gated_row(const float* gate, const float* up, int n, int activation, Out* out) {
    const float cubic = 0.044715f, root = 0.79788456080286536f;  // sqrt(2 / pi)
    for (int i = 0; i < n; i += 16) {
        Lanes g = load(gate + i), inner = g;
        if (activation == GELU_TANH) inner = all(2 * root) * fma(all(cubic) * g * g, g, g);
        Lanes sigmoid = all(1.0f) / (all(1.0f) + exp2(inner * all(-LOG2E)));
        store(out + i, g * sigmoid * load(up + i));
    }
}

void add_scaled(float* x, const float* y, float weight, int n) {
    for (int i = 0; i < n; i += 16) store(x + i, fma(load(y + i), all(weight), load(x + i)));
}

// One of a row's experts, what it weighs, and where the row lies among all rows of experts.
struct Choice {
    int expert, slot;
    float weight;
};

// The best of a router's scores by weight; the first of equal ones.  Spoils the scores.
void choose(const Experts& experts, float* scores, Choice* choices) {
    const float most = *std::max_element(scores, scores + experts.count);
    float total = 0, chosen = 0;
    for (int e = 0; e < experts.count; ++e) total += scores[e] = std::exp(scores[e] - most);
    for (int i = 0; i < experts.active; ++i) {
        float* best = std::max_element(scores, scores + experts.count);
        choices[i] = {int(best - scores), 0, *best / total};
        chosen += choices[i].weight;
        *best = -1;
    }
    for (int i = 0; i < experts.active; ++i)
        choices[i].weight *= experts.scale / (experts.normalised ? chosen : 1.0f);
}

// Bytes rounded so that the next thing starts on a cache line.
size_t lines(size_t bytes) {
    return (bytes + 63) / 64 * 64;
}

// One allocation for everything that a pass needs.
class Memory {
  public:
    ~Memory() { std::free(data_); }

    bool renew(size_t bytes) {
        std::free(data_);
        bytes_ = (bytes + 4095) / 4096 * 4096;
        data_ = static_cast<char*>(std::aligned_alloc(4096, bytes_));
        if (data_ == nullptr) bytes_ = 0;
        return data_ != nullptr;
    }

    char* at(size_t offset) const { return data_ + offset; }
    size_t bytes() const { return bytes_; }

  private:
    char* data_ = nullptr;
    size_t bytes_ = 0;
};

// The buffers of a pass: shared ones for all its rows, and some for each thread.
struct Buffers {
    float *x, *y, *z;  // the residual stream, the wanted rows of it, what is added next
    char* in;          // normed rows as products read them
    float* qkv;
    char* q;                        // turned, as elements of the cache
    char *attended, *picked;        // rows for o: all, and the wanted ones
    char* gated;                    // rows for down
    float* angles;                  // [rows][angles of every rope]
    float* scores;                  // of experts
    char* sorted;                   // normed rows by expert
    float* said;                    // by every expert of a row
    char *own, *row, *pair, *work;  // of thread 0; the next one's is `own_bytes` further
    size_t own_bytes = 0;
};

}  // namespace

class Stepper {
  public:
    explicit Stepper(const Model& model) : model_(model) {
        for (int i = 0; i < model.layer_count; ++i) {
            const AttentionShape& shape = model.layers[i].attention;
            size_t plan = 0;
            while (plan < shapes_.size() && !same_plan(shapes_[plan], shape)) ++plan;
            if (plan == shapes_.size()) shapes_.push_back(shape);
            plan_of_.push_back(int(plan));
        }
        plans_ = std::vector<AttentionPlan>(shapes_.size());
        for (int i = 0; i < model.rope_count; ++i) {
            angles_at_.push_back(angle_count_);
            angle_count_ += 2 * model.ropes[i].count;
        }
    }

    size_t bytes() const {
        size_t partials = 0;
        for (const AttentionPlan& plan : plans_) partials += plan.partials.capacity() * 4;
        return memory_.bytes() + partials;
    }

    // False when there is no memory for so many rows.
    bool run(const Batch& batch, float* logits) {
        const int rows = batch.sequences.starts[batch.sequences.count];
        for (int begin = 0, wanted = 0; begin < rows; begin += PASS_ROWS) {
            cut(batch, begin, std::min(rows, begin + PASS_ROWS), wanted);
            if (!reserve()) return false;
            for (size_t i = 0; i < plans_.size(); ++i)
                plan_attention(plans_[i], shapes_[i], batch_.sequences, threads_);
            float* out = logits + size_t(wanted) * model_.vocabulary;
            if (batch.element_bytes == 4)
                parallel([&](int thread, int) { pass<float>(out, thread); });
            else
                parallel([&](int thread, int) { pass<Bf16>(out, thread); });
            wanted += int(wanted_.size());
        }
        return true;
    }

  private:
    static bool same_plan(const AttentionShape& a, const AttentionShape& b) {
        return a.heads == b.heads && a.kv_heads == b.kv_heads && a.head_dim == b.head_dim &&
               a.window == b.window;
    }

    // The rows from begin to end as a batch of their own: what lies before them is cached.
    void cut(const Batch& batch, int begin, int end, int wanted) {
        const Sequences& all = batch.sequences;
        const int first = sequence_of(all, begin);
        starts_.assign(1, 0);
        lengths_.clear();
        for (int s = first; s < all.count && all.starts[s] < end; ++s) {
            const int stop = std::min(end, all.starts[s + 1]);
            starts_.push_back(stop - begin);
            lengths_.push_back(all.lengths[s] - (all.starts[s + 1] - stop));
        }
        wanted_.clear();
        for (; wanted < batch.wanted_count && batch.wanted[wanted] < end; ++wanted)
            wanted_.push_back(batch.wanted[wanted] - begin);
        keep(batch, begin, end);
        batch_ = batch;
        batch_.sequences = {int32_t(lengths_.size()), starts_.data(), lengths_.data()};
        batch_.tokens += begin;
        rows_ = end - begin;
        first_sequence_ = first;
    }

    // The rows that go on after the last attention: wanted ones, and those of pooled sequences.
    void keep(const Batch& batch, int begin, int end) {
        kept_.clear();
        pooled_.clear();
        if (batch.pooled_count == 0) {
            kept_ = wanted_;
            return;
        }
        const int32_t* starts = batch.sequences.starts;
        size_t next = 0;  // of the wanted rows, which from here on are counted among the kept
        for (int row = begin, pool = 0; row < end; ++row) {
            while (pool < batch.pooled_count && starts[batch.pooled[pool] + 1] <= row) ++pool;
            const bool summed = pool < batch.pooled_count && starts[batch.pooled[pool]] <= row;
            if (summed) pooled_.push_back({int(kept_.size()), pool});
            const bool wanted = next < wanted_.size() && wanted_[next] == row - begin;
            if (wanted) wanted_[next++] = int(kept_.size());
            if (summed || wanted) kept_.push_back(row - begin);
        }
    }

    // Buffers for the rows of this pass, kept for the next ones.
    bool reserve() {
        threads_ = threads();
        if (rows_ <= capacity_ && threads_ <= capacity_threads_) return true;
        capacity_ = std::max(capacity_, rows_);
        capacity_threads_ = std::max(capacity_threads_, threads_);
        size_t qkv = 0, heads = 0, out = 0, act = 0, work = 0, experts = 0, active = 0;
        size_t in = activation_bytes(F32, model_.hidden);  // the widest
        for (int i = 0; i < model_.layer_count; ++i) {
            const Layer& layer = model_.layers[i];
            qkv = std::max(qkv, size_t(layer.qkv.n));
            heads = std::max(heads, size_t(layer.o.k));
            out = std::max(out, activation_bytes(layer.o.type, layer.o.k));
            act = std::max(act, activation_bytes(layer.down.type, layer.down.k));
            work = std::max(work, size_t(attention_scratch_bytes(layer.attention)));
            if (layer.experts == nullptr) continue;
            experts = std::max(experts, size_t(layer.experts->count));
            active = std::max(active, size_t(layer.experts->active));
        }
        const size_t rows = size_t(capacity_), hidden = size_t(model_.hidden);
        size_t total = 0;
        const auto place = [&](size_t bytes) { return std::exchange(total, total + lines(bytes)); };
        const size_t shared[] = {place(rows * hidden * 4),
                                 place(rows * hidden * 4),
                                 place(rows * hidden * 4),
                                 place(rows * in),
                                 place(rows * qkv * 4),
                                 place(rows * heads * 4),
                                 place(rows * out),
                                 place(rows * out),
                                 place(rows * act * std::max<size_t>(1, active)),
                                 place(rows * angle_count_ * 4),
                                 place(rows * experts * 4),
                                 place(rows * active * in),
                                 place(rows * active * hidden * 4)};
        const size_t threads_at = total;
        const size_t own[] = {
            place(REDUNDANT_ROWS * std::max({in, out, act})), place(std::max(hidden, heads) * 4),
            place(std::max(PAIR_BYTES, size_t(PAIR) * 4 * PAIR_ROWS)), place(work)};
        const size_t own_bytes = total - threads_at;
        if (!memory_.renew(threads_at + own_bytes * capacity_threads_)) return capacity_ = 0, false;
        choices_.resize(rows * active);
        const auto floats = [&](size_t offset) {
            return reinterpret_cast<float*>(memory_.at(offset));
        };
        const auto bytes = [&](size_t offset) { return memory_.at(offset); };
        buffers_ = {floats(shared[0]),  floats(shared[1]), floats(shared[2]),  bytes(shared[3]),
                    floats(shared[4]),  bytes(shared[5]),  bytes(shared[6]),   bytes(shared[7]),
                    bytes(shared[8]),   floats(shared[9]), floats(shared[10]), bytes(shared[11]),
                    floats(shared[12]), bytes(own[0]),     bytes(own[1]),      bytes(own[2]),
                    bytes(own[3]),      own_bytes};
        return true;
    }

    // What every thread does, from tokens to logits.
    template <class E>
    void pass(float* logits, int thread) {
        float* x = buffers_.x;
        int rows = rows_;
        const float* post = nullptr;  // norm of what the layer before has still to add
        begin_rows(thread);
        barrier();
        for (int i = 0; i < model_.layer_count; ++i) {
            const Layer& layer = model_.layers[i];
            const bool last = i + 1 == model_.layer_count;
            const char* in = normed(x, rows, post, layer.norm, layer.qkv.type, thread);
            gemm(layer.qkv, in, rows, buffers_.qkv, layer.qkv.n, false, thread, threads_);
            if (thread == 0) plans_[plan_of_[i]].next.store(0, std::memory_order_relaxed);
            barrier();
            remember<E>(layer, thread);
            if (last && kept_.empty()) return;
            barrier();
            attend_layer<E>(i, thread);
            barrier();
            char* attended = buffers_.attended;
            if (last && int(kept_.size()) < rows) {  // the other rows have left their mark
                pick(layer, thread);
                barrier();
                attended = buffers_.picked, x = buffers_.y, rows = int(kept_.size());
            }
            in = completed(layer.o, attended, rows, thread);
            add_product(layer.o, in, x, rows, layer.post_attention_norm, thread);
            if (layer.experts != nullptr) {
                route(layer, x, rows, layer.post_attention_norm, thread);
                post = nullptr;
                continue;
            }
            in = normed(x, rows, layer.post_attention_norm, layer.ffn_norm, layer.gate_up.type,
                        thread);
            gate_and_up(layer, layer.gate_up, in, rows, buffers_.gated, thread);
            barrier();
            in = completed(layer.down, buffers_.gated, rows, thread);
            add_product(layer.down, in, x, rows, layer.post_ffn_norm, thread);
            post = layer.post_ffn_norm;
        }
        const char* in = pooled_.empty()
                             ? normed(x, rows, post, model_.norm, model_.head.type, thread)
                             : summed(x, rows, post, thread);
        rows = int(wanted_.size());
        if (rows == 0) return;
        gemm(model_.head, in, rows, logits, model_.vocabulary, false, thread, threads_);
        if (model_.logit_softcap > 0) cap(logits, rows, thread);
    }

    // Embeddings, and the angles of every rope.
    void begin_rows(int thread) {
        const Range mine = share(rows_, thread, threads_);
        for (int row = mine.begin; row < mine.end; ++row) {
            float* x = buffers_.x + size_t(row) * model_.hidden;
            unpack_row(model_.embed, batch_.tokens[row], x);
            if (model_.embedding_scale != 1.0f)
                for (int i = 0; i < model_.hidden; ++i) x[i] *= model_.embedding_scale;
            const int sequence = sequence_of(batch_.sequences, row);
            const float position = float(position_of(batch_.sequences, sequence, row));
            for (int r = 0; r < model_.rope_count; ++r) {
                const Rope& rope = model_.ropes[r];
                float* to = buffers_.angles + size_t(row) * angle_count_ + angles_at_[r];
                for (int i = 0; i < rope.count; ++i) {
                    const float angle = position * rope.inverse_frequencies[i];
                    to[i] = std::cos(angle) * rope.scale;
                    to[rope.count + i] = std::sin(angle) * rope.scale;
                }
            }
        }
    }

    // x += norm(z) when that is still due, then the norm of x as rows that `type` multiplies.
    // Ends with a barrier unless every thread made its own.
    const char* normed(float* x, int rows, const float* post, const float* weight, int type,
                       int thread) {
        const bool redundant = post == nullptr && rows <= REDUNDANT_ROWS;
        const Range mine = redundant ? Range{0, rows} : share(rows, thread, threads_);
        char* to = redundant ? own(buffers_.own, thread) : buffers_.in;
        float* row = reinterpret_cast<float*>(own(buffers_.row, thread));
        const size_t stride = activation_bytes(type, model_.hidden);
        for (int r = mine.begin; r < mine.end; ++r) {
            float* x_row = x + size_t(r) * model_.hidden;
            if (post != nullptr) {
                norm_row(buffers_.z + size_t(r) * model_.hidden, post, model_.hidden,
                         model_.norm_eps, row);
                add_row(x_row, row, model_.hidden);
            }
            norm_row(x_row, weight, model_.hidden, model_.norm_eps, row);
            prepare_row(type, model_.hidden, row, to + r * stride);
        }
        if (!redundant) barrier();
        return to;
    }

    // `normed` for the head when some rows are summed: their norms are added to the sums one
    // after the other, so that chunks and company change no bit; the wanted ones come back.
    const char* summed(float* x, int rows, const float* post, int thread) {
        const size_t hidden = size_t(model_.hidden),
                     stride = activation_bytes(model_.head.type, model_.hidden);
        float* row = reinterpret_cast<float*>(own(buffers_.row, thread));
        const Range mine = share(rows, thread, threads_);
        for (int r = mine.begin; r < mine.end; ++r) {
            float *x_row = x + r * hidden, *z_row = buffers_.z + r * hidden;
            if (post != nullptr) {
                norm_row(z_row, post, model_.hidden, model_.norm_eps, row);
                add_row(x_row, row, model_.hidden);
            }
            norm_row(x_row, model_.norm, model_.hidden, model_.norm_eps, z_row);
        }
        barrier();
        const Range lanes = share(model_.hidden / 16, thread, threads_);
        for (const auto& [r, pool] : pooled_)
            add_row(batch_.sums + pool * hidden + lanes.begin * 16,
                    buffers_.z + r * hidden + lanes.begin * 16, (lanes.end - lanes.begin) * 16);
        const Range heads = share(int(wanted_.size()), thread, threads_);
        for (int i = heads.begin; i < heads.end; ++i)
            prepare_row(model_.head.type, model_.hidden, buffers_.z + wanted_[i] * hidden,
                        buffers_.in + i * stride);
        barrier();
        return buffers_.in;
    }

    // Rows that hold all their values, as W reads them: GGUF types want sums of blocks, too.
    const char* completed(const Matrix& w, char* values, int rows, int thread) {
        if (w.type == F32 || w.type == BF16) return values;
        const bool redundant = rows <= REDUNDANT_ROWS;
        const Range mine = redundant ? Range{0, rows} : share(rows, thread, threads_);
        char* to = redundant ? own(buffers_.own, thread) : values;
        const size_t stride = activation_bytes(w.type, w.k);
        for (int r = mine.begin; r < mine.end; ++r)
            prepare_row(w.type, w.k, activation_kind(w.type), values + r * stride, to + r * stride);
        if (!redundant) barrier();
        return to;
    }

    // x += W a, or z = W a when a norm comes between.
    void add_product(const Matrix& w, const char* a, float* x, int rows, const float* post,
                     int thread) {
        gemm(w, a, rows, post == nullptr ? x : buffers_.z, model_.hidden, post == nullptr, thread,
             threads_);
        barrier();
    }

    // Queries turned for `attend`, keys and values into the cache: by rows, or by heads for few
    // rows.
    template <class E>
    void remember(const Layer& layer, int thread) {
        const bool few = rows_ < 2 * threads_;
        const AttentionShape& shape = layer.attention;
        const Range rows = few ? Range{0, rows_} : rows_of(batch_.sequences, thread, threads_);
        const Range heads =
            few ? share(shape.kv_heads, thread, threads_) : Range{0, shape.kv_heads};
        const int group = shape.heads / shape.kv_heads, dim = shape.head_dim;
        const Cache cache = cache_of(layer);
        const Table table = table_of(layer);
        float* head = reinterpret_cast<float*>(own(buffers_.row, thread));
        for (int row = rows.begin; row < rows.end; ++row) {
            const float* qkv = buffers_.qkv + size_t(row) * layer.qkv.n;
            const float* angles =
                buffers_.angles + size_t(row) * angle_count_ + angles_at_[layer.rope];
            const auto turn = [&](const float* from, const float* norm) {
                if (norm != nullptr)
                    norm_row(from, norm, dim, model_.norm_eps, head);
                else
                    std::memcpy(head, from, size_t(dim) * 4);
                rotate(head, angles, model_.ropes[layer.rope]);
            };
            E* q = reinterpret_cast<E*>(buffers_.q) + size_t(row) * shape.heads * dim;
            for (int h = heads.begin * group; h < heads.end * group; ++h) {
                turn(qkv + h * dim, layer.q_norm);
                for (int d = 0; d < dim; d += 16) store(q + h * dim + d, load(head + d));
            }
            const int sequence = sequence_of(batch_.sequences, row);
            const int position = position_of(batch_.sequences, sequence, row);
            for (int h = heads.begin; h < heads.end; ++h) {
                turn(qkv + (shape.heads + h) * dim, layer.k_norm);
                write_cache<E>(cache, table, sequence, position, h, head,
                               qkv + (shape.heads + shape.kv_heads + h) * dim);
            }
        }
    }

    template <class E>
    void attend_layer(int index, int thread) {
        const Layer& layer = model_.layers[index];
        const int64_t bytes = int64_t(activation_bytes(layer.o.type, layer.o.k));
        const auto into = [&](auto* out) {
            attend(plans_[plan_of_[index]], layer.attention, cache_of(layer), table_of(layer),
                   batch_.sequences, reinterpret_cast<const E*>(buffers_.q), layer.o.k, out,
                   bytes / int64_t(sizeof *out), own(buffers_.work, thread));
        };
        if (activation_kind(layer.o.type) == F32)
            into(reinterpret_cast<float*>(buffers_.attended));
        else
            into(reinterpret_cast<Bf16*>(buffers_.attended));
    }

    // After the last attention only the kept rows go on.
    void pick(const Layer& layer, int thread) {
        const size_t bytes = activation_bytes(layer.o.type, layer.o.k),
                     hidden = size_t(model_.hidden);
        const Range mine = share(int(kept_.size()), thread, threads_);
        for (int i = mine.begin; i < mine.end; ++i) {
            const size_t row = size_t(kept_[i]);
            std::memcpy(buffers_.picked + i * bytes, buffers_.attended + row * bytes, bytes);
            std::memcpy(buffers_.y + i * hidden, buffers_.x + row * hidden, hidden * 4);
        }
    }

    // act(gate) x up, straight into rows for `down`: a thread has the panels of both.
    void gate_and_up(const Layer& layer, const Matrix& w, const char* in, int rows, char* out,
                     int thread) {
        const Range mine = share(w.n / PAIR, thread, threads_);
        const size_t pair_bytes = packed_bytes(w.type, PAIR, w.k),
                     in_bytes = activation_bytes(w.type, w.k);
        const size_t out_bytes = activation_bytes(layer.down.type, layer.down.k);
        float* values = reinterpret_cast<float*>(own(buffers_.pair, thread));
        for (int row = 0; row < rows; row += PAIR_ROWS) {
            const int count = std::min(PAIR_ROWS, rows - row);
            const int together = std::max(1, int(PAIR_BYTES / (size_t(PAIR) * 4 * count)));
            for (int pair = mine.begin; pair < mine.end; pair += together) {
                const int pairs = std::min(together, mine.end - pair);
                const Matrix part{pairs * PAIR, w.k, w.type,
                                  static_cast<const char*>(w.data) + pair * pair_bytes, nullptr};
                gemm(part, in + row * in_bytes, count, values, part.n, false, 0, 1);
                multiply(layer, values, count, pair, pairs, out + row * out_bytes);
            }
        }
    }

    void multiply(const Layer& layer, const float* values, int rows, int pair, int pairs,
                  char* out) {
        const size_t bytes = activation_bytes(layer.down.type, layer.down.k);
        const bool wide = activation_kind(layer.down.type) == F32;
        for (int r = 0; r < rows; ++r, out += bytes)
            for (int p = 0; p < pairs; ++p) {
                const int first = (pair + p) * PANEL,
                          count = std::min(PANEL, layer.intermediate - first);
                const float* gate = values + (size_t(r) * pairs + p) * PAIR;
                if (wide)
                    gated_row(gate, gate + PANEL, count, layer.activation,
                              reinterpret_cast<float*>(out) + first);
                else
                    gated_row(gate, gate + PANEL, count, layer.activation,
                              reinterpret_cast<Bf16*>(out) + first);
            }
    }

    // Rows sorted by expert, so that each expert multiplies its rows at once; every row then
    // adds what its experts say in the order of their weights.
    void route(const Layer& layer, float* x, int rows, const float* post, int thread) {
        const Experts& experts = *layer.experts;
        const size_t hidden = size_t(model_.hidden),
                     gated_bytes = activation_bytes(layer.down.type, layer.down.k);
        const char* in = normed(x, rows, post, layer.ffn_norm, F32, thread);
        gemm(experts.router, in, rows, buffers_.scores, experts.count, false, thread, threads_);
        barrier();
        in = normed(x, rows, nullptr, layer.ffn_norm, layer.gate_up.type, thread);
        const Range mine = share(rows, thread, threads_);
        for (int r = mine.begin; r < mine.end; ++r)
            choose(experts, buffers_.scores + size_t(r) * experts.count,
                   &choices_[r * experts.active]);
        barrier();
        if (thread == 0) sort_by_expert(experts, rows);
        barrier();
        const size_t in_bytes = activation_bytes(layer.gate_up.type, model_.hidden);
        for (int i = mine.begin * experts.active; i < mine.end * experts.active; ++i)
            std::memcpy(buffers_.sorted + choices_[i].slot * in_bytes,
                        in + i / experts.active * in_bytes, in_bytes);
        barrier();
        each_expert(experts, [&](int e, int first, int count) {
            gate_and_up(layer, experts.gate_up[e], buffers_.sorted + first * in_bytes, count,
                        buffers_.gated + first * gated_bytes, thread);
        });
        barrier();
        const char* gated = completed(layer.down, buffers_.gated, rows * experts.active, thread);
        each_expert(experts, [&](int e, int first, int count) {
            gemm(experts.down[e], gated + first * gated_bytes, count,
                 buffers_.said + first * hidden, model_.hidden, false, thread, threads_);
        });
        barrier();
        for (int r = mine.begin; r < mine.end; ++r)
            for (int i = r * experts.active; i < (r + 1) * experts.active; ++i)
                add_scaled(x + r * hidden, buffers_.said + choices_[i].slot * hidden,
                           choices_[i].weight, model_.hidden);
        barrier();
    }

    void sort_by_expert(const Experts& experts, int rows) {
        first_of_.assign(size_t(experts.count) + 1, 0);
        const int choices = rows * experts.active;
        for (int i = 0; i < choices; ++i) ++first_of_[choices_[i].expert + 1];
        for (int e = 0; e < experts.count; ++e) first_of_[e + 1] += first_of_[e];
        std::vector<int>& next = next_of_;
        next.assign(first_of_.begin(), first_of_.end() - 1);
        for (int i = 0; i < choices; ++i) choices_[i].slot = next[choices_[i].expert]++;
    }

    template <class F>
    void each_expert(const Experts& experts, F&& work) {
        for (int e = 0; e < experts.count; ++e)
            if (first_of_[e] < first_of_[e + 1])
                work(e, first_of_[e], first_of_[e + 1] - first_of_[e]);
    }

    void cap(float* logits, int rows, int thread) {
        const Range mine = columns_of(model_.head, thread, threads_);
        for (int r = 0; r < rows; ++r)
            for (int i = mine.begin; i < mine.end; ++i) {
                float& logit = logits[size_t(r) * model_.vocabulary + i];
                logit = model_.logit_softcap * std::tanh(logit / model_.logit_softcap);
            }
    }

    Cache cache_of(const Layer& layer) const {
        const AttentionShape& shape = layer.attention;
        const int64_t layer_bytes = int64_t(2) * batch_.block_tokens * shape.kv_heads *
                                    shape.head_dim * batch_.element_bytes;
        return {batch_.pages,   batch_.page_bytes, layer.slot * layer_bytes, batch_.block_tokens,
                shape.kv_heads, shape.head_dim,    batch_.element_bytes};
    }

    Table table_of(const Layer& layer) const {
        const int stride = batch_.strides[layer.group];
        return {batch_.tables[layer.group] + int64_t(first_sequence_) * stride, stride, layer.parts,
                layer.part};
    }

    char* own(char* first, int thread) const { return first + buffers_.own_bytes * thread; }

    const Model model_;
    std::vector<AttentionShape> shapes_;  // that plans differ by
    std::vector<int> plan_of_;            // of each layer
    std::vector<AttentionPlan> plans_;
    std::vector<int> angles_at_;  // of each rope
    int angle_count_ = 0;

    Memory memory_;
    std::vector<Choice> choices_;          // [rows][active]
    std::vector<int> first_of_, next_of_;  // slot of each expert
    Buffers buffers_{};
    int capacity_ = 0, capacity_threads_ = 0;

    // This pass
    Batch batch_{};
    std::vector<int32_t> starts_, lengths_, wanted_, kept_;
    std::vector<std::pair<int, int>> pooled_;  // (a kept row, the sum it adds to)
    int rows_ = 0, first_sequence_ = 0, threads_ = 1;
};

}  // namespace tl

extern "C" {

// `model` and what it points to must outlive the stepper.
tl::Stepper* tl_stepper(const tl::Model* model) {
    return new tl::Stepper(*model);
}
void tl_stepper_free(tl::Stepper* stepper) {
    delete stepper;
}
size_t tl_stepper_bytes(const tl::Stepper* stepper) {
    return stepper->bytes();
}

// logits: [wanted][vocabulary] F32.  1 when done, 0 when there is no memory for so many rows.
int tl_step(tl::Stepper* stepper, const tl::Batch* batch, float* logits) {
    return stepper->run(*batch, logits);
}

// Gate and up in alternating panels, as `Layer::gate_up` wants them; rows `stride` bytes apart.
void tl_pack_pairs(void* packed, int type, int rows, int k, int source_type, const void* gate,
                   const void* up, size_t gate_stride, size_t up_stride) {
    const int pairs = (rows + tl::PANEL - 1) / tl::PANEL;
    tl::parallel([&](int thread, int threads) {
        for (int pair = 0; pair < pairs; ++pair) {
            const int first = pair * tl::PANEL, count = std::min(tl::PANEL, rows - first);
            const auto put = [&](const void* from, size_t stride, int to) {
                tl::pack(packed, type, pairs * 2 * tl::PANEL, k, source_type,
                         static_cast<const char*>(from) + first * stride, stride, to, count, thread,
                         threads);
            };
            put(gate, gate_stride, 2 * first);
            put(up, up_stride, 2 * first + tl::PANEL);
        }
    });
}

}  // extern "C"
