// See lossless.h. Values are coded channel by channel, so that the tokens of a channel do not wait for each other; the
// two dims of a rotated pair are predicted together and coded one after the other.

#include "cpu/lossless.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/cpu_kernels.h"
#include "cpu/parallel.h"

#if CACHEGEN_X86
#include "cpu/avx2.h"
#endif

namespace cachegen::lossless {
namespace {

constexpr int kTurnBits = 12;  // of the table of sines
constexpr int kSineBits = 15;
constexpr int64_t kMaxUnits = int64_t{1} << 30;
constexpr uint32_t kTotal = kFrequencyTotal;

// --- rotation --------------------------------------------------------------------------------------------------------

// Sines of a whole turn in 2^-15, from integers only: no library's last bit decides.
class SineTable {
  public:
    SineTable() : values_((1 << kTurnBits) + 1) {
        constexpr int kQuarter = 1 << (kTurnBits - 2);
        constexpr int64_t kPi = 3622009729038561421;  // 2^60 pi
        for (int i = 0; i <= kQuarter; ++i) {
            const int64_t x = static_cast<int64_t>(static_cast<__int128>(kPi) * i / (2 * kQuarter));
            int64_t term = x, sum = x;
            for (int n = 2; n < 24; n += 2) {
                term = static_cast<int64_t>(static_cast<__int128>(term) * x >> 60);
                term = -static_cast<int64_t>(static_cast<__int128>(term) * x >> 60) / (n * (n + 1));
                sum += term;
            }
            const auto sine = static_cast<int32_t>((sum + (int64_t{1} << (59 - kSineBits))) >> (60 - kSineBits));
            values_[i] = values_[2 * kQuarter - i] = sine;
            values_[2 * kQuarter + i] = values_[4 * kQuarter - i] = -sine;
        }
    }

    // Of a phase in 2^-64 turns.
    int32_t sine(uint64_t phase) const {
        const auto index = static_cast<size_t>(phase >> (64 - kTurnBits));
        const auto part = static_cast<int64_t>(phase << kTurnBits >> 48);
        return values_[index] + static_cast<int32_t>(((values_[index + 1] - values_[index]) * part) >> 16);
    }
    int32_t cosine(uint64_t phase) const { return sine(phase + (uint64_t{1} << 62)); }

  private:
    std::vector<int32_t> values_;
};

struct Angle {
    int32_t cosine, sine;
};

// --- values and units ------------------------------------------------------------------------------------------------

// The bits of a dtype with kMantissaBits bits of mantissa, the hidden one included.
template <bool kIsFloat16>
struct Bits {
    static constexpr int kMantissaBits = kIsFloat16 ? 11 : 8;
    static constexpr int kExponentBias = kIsFloat16 ? 15 : 127;
    static constexpr uint32_t kStored = (1u << (kMantissaBits - 1)) - 1;
    static constexpr uint32_t kMaxExponent = kIsFloat16 ? 31 : 255;

    // |value| = mantissa 2^power; false where it is infinite or no number.
    static bool split(uint16_t bits, int64_t& mantissa, int& power) {
        const uint32_t exponent = (bits & 0x7FFFu) >> (kMantissaBits - 1);
        mantissa = bits & kStored;
        if (exponent == kMaxExponent) return false;
        if (exponent > 0) mantissa |= kStored + 1;
        power = static_cast<int>(std::max(exponent, 1u)) - kExponentBias - (kMantissaBits - 1);
        return true;
    }

    // The bits of mantissa 2^power, which the dtype has; the lowest bits of the mantissa may be zeros beyond it.
    // Returns false where it has not: only bytes that were tampered with say so.
    static bool join(int64_t mantissa, int power, bool is_negative, uint16_t& bits) {
        constexpr int kLowest = 1 - kExponentBias - (kMantissaBits - 1);
        while (mantissa > 2 * static_cast<int64_t>(kStored) + 1 || power < kLowest) {
            if (mantissa & 1) return false;
            if (mantissa == 0) return false;
            mantissa >>= 1, ++power;
        }
        while (mantissa <= kStored && power > kLowest) mantissa <<= 1, --power;
        const int exponent = mantissa <= kStored ? 0 : power - kLowest + 1;
        if (exponent >= static_cast<int>(kMaxExponent)) return false;
        bits = static_cast<uint16_t>((is_negative ? 0x8000u : 0u) |
                                     (static_cast<uint32_t>(exponent) << (kMantissaBits - 1)) |
                                     (static_cast<uint32_t>(mantissa) & kStored));
        return true;
    }
};

int log2_floor(uint64_t number) { return 63 - __builtin_clzll(number); }

int64_t shift_left(int64_t number, int count) {
    return count >= 0 ? number << std::min(count, 62) : number >> std::min(-count, 62);
}

// A value in units, and the bits of its magnitude below one unit.
struct Units {
    int64_t whole;  // signed
    uint32_t remainder;
    int remainder_bits;  // 16 where the remainder is the value's own bits
    bool is_escape;
};

template <class Dtype>
Units to_units(uint16_t bits, int exponent) {
    Units units{0, bits, 16, false};
    int64_t mantissa;
    int power;
    if (!Dtype::split(bits, mantissa, power)) {
        units.is_escape = true;
        return units;
    }
    const int shift = power + exponent;
    if (mantissa == 0 || shift + log2_floor(mantissa) < 0) return units;  // less than one unit
    if (shift + log2_floor(mantissa) >= 30) {
        units.is_escape = true;
        units.whole = (bits & 0x8000u) ? -kMaxUnits : kMaxUnits;
        return units;
    }
    const int64_t magnitude = shift_left(mantissa, shift);
    units.whole = (bits & 0x8000u) ? -magnitude : magnitude;
    units.remainder_bits = std::max(0, Dtype::kMantissaBits - 1 - log2_floor(magnitude));
    const int64_t fine = shift_left(mantissa, shift + units.remainder_bits);
    units.remainder = static_cast<uint32_t>(fine - (magnitude << units.remainder_bits));
    return units;
}

template <class Dtype>
bool from_units(const Units& units, int exponent, uint16_t& bits) {
    if (units.remainder_bits == 16) {
        bits = static_cast<uint16_t>(units.remainder);
        return true;
    }
    const int64_t magnitude = units.whole < 0 ? -units.whole : units.whole;
    const int64_t fine = (magnitude << units.remainder_bits) + units.remainder;
    return Dtype::join(fine, -exponent - units.remainder_bits, units.whole < 0, bits);
}

// The place of a magnitude among those that the dtype has at this size: all integers while they are small, then every
// second, every fourth, ...
template <class Dtype>
int64_t place_of(int64_t magnitude, bool& is_between) {
    constexpr int kBits = Dtype::kMantissaBits;
    if (magnitude < (int64_t{1} << kBits)) {
        is_between = false;
        return magnitude;
    }
    const int shift = log2_floor(magnitude) - (kBits - 1);
    is_between = (magnitude & ((int64_t{1} << shift) - 1)) != 0;
    return (static_cast<int64_t>(shift) << (kBits - 1)) + (magnitude >> shift);
}

template <class Dtype>
int64_t magnitude_at(int64_t place) {
    constexpr int kBits = Dtype::kMantissaBits;
    if (place < (int64_t{1} << kBits)) return place;
    const int64_t shift = (place >> (kBits - 1)) - 1;
    return (place - (shift << (kBits - 1))) << shift;
}

// The first place whose value is at least `units`.
template <class Dtype>
int64_t first_place(int64_t units) {
    bool is_between;
    if (units <= 0) return -place_of<Dtype>(-units, is_between);
    const int64_t place = place_of<Dtype>(units, is_between);
    return place + (is_between ? 1 : 0);
}

int64_t divide_down(int64_t dividend, int64_t divisor) {
    const int64_t quotient = dividend / divisor;
    return quotient - (dividend % divisor < 0 ? 1 : 0);
}

// The values of one step: their places are first to first + count - 1.
template <class Dtype>
void find_step(const Channel& channel, int64_t prediction, int symbol, int64_t& first, int64_t& count) {
    const int64_t begin = prediction + int64_t{symbol - 31} * channel.step - channel.step / 2;
    first = first_place<Dtype>(begin);
    count = first_place<Dtype>(begin + channel.step) - first;
}

// --- prediction ------------------------------------------------------------------------------------------------------

using Dot = int32_t (*)(const int8_t*, const int16_t*, int64_t);

int32_t dot_portable(const int8_t* weights, const int16_t* history, int64_t count) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += static_cast<int32_t>(weights[i]) * history[i];
    return sum;
}

#if CACHEGEN_X86
CACHEGEN_AVX2 int32_t dot_avx2(const int8_t* weights, const int16_t* history, int64_t count) {
    __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    int64_t i = 0;
    for (; i + 32 <= count; i += 32)
        for (int part = 0; part < 2; ++part) {
            const __m256i weight =
                _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + i + 16 * part)));
            const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(history + i + 16 * part));
            sums[part] = _mm256_add_epi32(sums[part], _mm256_madd_epi16(weight, value));
        }
    const __m256i both = _mm256_add_epi32(sums[0], sums[1]);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1));
    return _mm_cvtsi128_si32(four) + dot_portable(weights + i, history + i, count - i);
}
#endif

Dot choose_dot() {
#if CACHEGEN_X86
    if (__builtin_cpu_supports("avx2")) return dot_avx2;
#endif
    return dot_portable;
}

int64_t predict(const Channel& channel, int32_t sum) {
    const int64_t prediction = channel.mean + ((int64_t{sum} * channel.multiplier) >> channel.shift);
    return std::clamp(prediction, -kMaxUnits, kMaxUnits);
}

int16_t to_history(const Channel& channel, int64_t units) {
    const int64_t distance = (units - channel.mean) >> channel.history_shift;
    return static_cast<int16_t>(std::clamp<int64_t>(distance, -kMaxHistory, kMaxHistory));
}

int64_t turn(int64_t a, int64_t cosine, int64_t b, int64_t sine) {
    return (a * cosine + b * sine + (1 << (kSineBits - 1))) >> kSineBits;
}

// Go through a block's values in the order of their coding. code(layer, channel, token, prediction) returns the units
// of the value there, which it has read or written.
template <class Code, class EndLayer>
void walk(const Model& model, int64_t num_tokens, int64_t first_token, Code&& code, EndLayer&& end_layer) {
    static const SineTable sines;
    static const Dot dot = choose_dot();
    const auto num_channels = static_cast<int64_t>(model.channels.size());
    const auto num_turns = static_cast<int64_t>(model.turns.size());
    std::vector<int16_t> history(num_tokens * num_channels, 0);
    std::vector<Angle> angles(num_tokens * num_turns);
    for (int64_t index = 0; index < num_turns; ++index)
        for (int64_t token = 0; token < num_tokens; ++token) {
            const uint64_t phase = static_cast<uint64_t>(first_token + token) * model.turns[index];
            angles[index * num_tokens + token] = {sines.cosine(phase), sines.sine(phase)};
        }
    for (size_t index = 0; index < model.layers.size(); ++index) {
        const Layer& layer = model.layers[index];
        const int64_t before = layer.first_channel - layer.context_begin;
        const int64_t width = before + layer.num_channels;
        for (int64_t offset = 0; offset < layer.num_channels; ++offset) {
            const int64_t first = layer.first_channel + offset;
            const Channel& one = model.channels[first];
            if (one.distance < 0) continue;  // coded with the first of its pair
            const bool is_pair = one.distance > 0;
            const int64_t second = first + one.distance;
            const Channel& two = model.channels[second];
            const int8_t* weights = layer.weights == nullptr ? nullptr : layer.weights + offset * width;
            const int8_t* others = weights == nullptr ? nullptr : weights + one.distance * width;
            // A head's channels are not known in order: the whole layer is used, what is not known yet being zero.
            const int64_t count = weights == nullptr ? 0 : width;
            int16_t* row = history.data();
            for (int64_t token = 0; token < num_tokens; ++token, row += num_channels) {
                const int16_t* context = row + layer.context_begin;
                const int64_t prediction = predict(one, count == 0 ? 0 : dot(weights, context, count));
                if (!is_pair) {
                    row[first] = to_history(one, code(index, first, token, prediction));
                    continue;
                }
                const int64_t other = predict(two, count == 0 ? 0 : dot(others, context, count));
                const auto [cosine, sine] = angles[one.turn * num_tokens + token];
                const int64_t a = code(index, first, token, turn(prediction, cosine, other, -sine));
                const int64_t b = code(index, second, token, turn(other, cosine, prediction, sine));
                row[first] = to_history(one, turn(a, cosine, b, sine));
                row[second] = to_history(two, turn(b, cosine, a, -sine));
            }
        }
        end_layer(index);
    }
}

// --- the rANS coder --------------------------------------------------------------------------------------------------

// What one value costs: a symbol, its place within the step, and bits below that.
struct Coded {
    uint8_t symbol;
    uint8_t remainder_bits;
    uint16_t remainder;
    uint16_t place;
    uint16_t count;
    uint32_t offset;  // the channel's in its layer
    uint32_t token;
};

template <class Dtype>
Coded code_value(const Channel& channel, int64_t prediction, uint16_t bits, const Units& units) {
    Coded coded{kEscape, 16, bits, 0, 1, 0, 0};
    const int64_t steps = divide_down(units.whole - prediction + channel.step / 2, channel.step);
    if (units.is_escape || steps < -31 || steps > 31) return coded;
    coded.symbol = static_cast<uint8_t>(steps + 31);
    int64_t first, count;
    find_step<Dtype>(channel, prediction, coded.symbol, first, count);
    coded.place = static_cast<uint16_t>(first_place<Dtype>(units.whole) - first);
    coded.count = static_cast<uint16_t>(count);
    coded.remainder_bits = static_cast<uint8_t>(units.remainder_bits);
    coded.remainder = static_cast<uint16_t>(units.remainder);
    return coded;
}

// Frequencies of `count` equally likely places: place p begins at p 4096 / count.
uint32_t place_start(uint32_t place, uint32_t count) { return (place << kFrequencyBits) / count; }

class Encoder {
  public:
    explicit Encoder(std::vector<uint16_t>& words) : words_(words) {
        std::fill(states_, states_ + kNumLanes, kStateLow);
    }

    void put(int64_t token, uint32_t start, uint32_t frequency, int total_bits) {
        uint32_t& state = states_[token % kNumLanes];
        if (state >= uint64_t{frequency} << (32 - total_bits)) {
            words_.push_back(static_cast<uint16_t>(state));
            state >>= kWordBits;
        }
        state = ((state / frequency) << total_bits) + state % frequency + start;
    }

    void finish(std::vector<uint8_t>& stream) {
        stream.reserve(4 * kNumLanes + 2 * words_.size());
        for (const uint32_t state : states_)
            for (int i = 0; i < 4; ++i) stream.push_back(static_cast<uint8_t>(state >> (8 * i)));
        for (auto word = words_.rbegin(); word != words_.rend(); ++word) {
            stream.push_back(static_cast<uint8_t>(*word));
            stream.push_back(static_cast<uint8_t>(*word >> 8));
        }
    }

  private:
    uint32_t states_[kNumLanes];
    std::vector<uint16_t>& words_;
};

class Decoder {
  public:
    void begin(const uint8_t* bytes, int64_t num_bytes, Status& status) {
        status = num_bytes < 4 * kNumLanes || num_bytes % 2 != 0 ? Status::kTruncated : Status::kOk;
        if (status != Status::kOk) return;
        for (int lane = 0; lane < kNumLanes; ++lane) {
            states_[lane] = 0;
            for (int i = 0; i < 4; ++i) states_[lane] |= uint32_t{bytes[4 * lane + i]} << (8 * i);
            if (states_[lane] < kStateLow) status = Status::kCorrupt;
        }
        next_ = bytes + 4 * kNumLanes;
        end_ = bytes + num_bytes;
        is_short_ = false;
    }

    uint32_t slot(int64_t token, int total_bits) const { return states_[token % kNumLanes] & ((1u << total_bits) - 1); }

    void take(int64_t token, uint32_t start, uint32_t frequency, int total_bits) {
        uint32_t& state = states_[token % kNumLanes];
        state = frequency * (state >> total_bits) + (state & ((1u << total_bits) - 1)) - start;
        if (state >= kStateLow) return;
        uint32_t word = 0;
        if (next_ < end_) {
            word = next_[0] | uint32_t{next_[1]} << 8;
            next_ += 2;
        } else {
            is_short_ = true;
        }
        state = (state << kWordBits) | word;
    }

    bool is_short() const { return is_short_; }
    bool is_at_end() const {
        return next_ == end_ &&
               std::all_of(states_, states_ + kNumLanes, [](uint32_t state) { return state == kStateLow; });
    }

  private:
    uint32_t states_[kNumLanes] = {};
    const uint8_t *next_ = nullptr, *end_ = nullptr;
    bool is_short_ = false;
};

// Starts of a table's symbols, and its total behind them.
struct Starts {
    explicit Starts(const uint16_t* frequencies) {
        for (int symbol = 0; symbol < kNumSymbols; ++symbol) start[symbol + 1] = start[symbol] + frequencies[symbol];
    }
    uint32_t start[kNumSymbols + 1] = {};
};

template <class Dtype>
void encode_block(const Model& model, const Values& values, std::vector<uint8_t>* streams) {
    std::vector<Coded> coded;
    std::vector<uint16_t> words;
    walk(
        model, values.num_tokens, values.first_token,
        [&](size_t index, int64_t channel, int64_t token, int64_t prediction) {
            const Channel& parameters = model.channels[channel];
            const uint16_t bits = values.bits[token * values.num_channels + channel];
            const Units units = to_units<Dtype>(bits, parameters.exponent);
            coded.push_back(code_value<Dtype>(parameters, prediction, bits, units));
            coded.back().offset = static_cast<uint32_t>(channel - model.layers[index].first_channel);
            coded.back().token = static_cast<uint32_t>(token);
            return units.whole;
        },
        [&](size_t index) {
            const Layer& layer = model.layers[index];
            const Starts starts[2] = {Starts(layer.frequencies), Starts(layer.frequencies + kNumSymbols)};
            words.clear();
            Encoder encoder(words);
            for (size_t i = coded.size(); i-- > 0;) {
                const Coded& value = coded[i];
                const auto token = static_cast<int64_t>(value.token);
                const int kind = value.offset < layer.num_key_channels ? 0 : 1;
                if (value.symbol == kEscape || value.remainder_bits > 0)
                    encoder.put(token, value.remainder, 1, value.remainder_bits);
                if (value.symbol != kEscape && value.count > 1) {
                    const uint32_t start = place_start(value.place, value.count);
                    encoder.put(token, start, place_start(value.place + 1u, value.count) - start, kFrequencyBits);
                }
                const uint32_t start = starts[kind].start[value.symbol];
                encoder.put(token, start, starts[kind].start[value.symbol + 1] - start, kFrequencyBits);
            }
            encoder.finish(streams[index]);
            coded.clear();
        });
}

template <class Dtype>
Outcome decode_block(const Model& model, const std::pair<const uint8_t*, int64_t>* streams, Values& values) {
    Outcome outcome{0, Status::kOk};
    Decoder decoder;
    std::vector<uint8_t> symbols[2] = {std::vector<uint8_t>(kTotal), std::vector<uint8_t>(kTotal)};
    std::vector<Starts> starts;
    const auto begin_layer = [&](size_t index) {
        Status status;
        decoder.begin(streams[index].first, streams[index].second, status);
        if (status != Status::kOk) outcome = {static_cast<int64_t>(index), status};
        starts.clear();
        for (int kind = 0; kind < 2; ++kind) {
            starts.emplace_back(model.layers[index].frequencies + kind * kNumSymbols);
            for (int symbol = 0; symbol < kNumSymbols; ++symbol)
                std::fill(symbols[kind].begin() + starts[kind].start[symbol],
                          symbols[kind].begin() + starts[kind].start[symbol + 1], static_cast<uint8_t>(symbol));
        }
    };
    begin_layer(0);
    walk(
        model, values.num_tokens, values.first_token,
        [&](size_t index, int64_t channel, int64_t token, int64_t prediction) -> int64_t {
            if (outcome.status != Status::kOk) return 0;
            const Channel& parameters = model.channels[channel];
            const Layer& layer = model.layers[index];
            const int kind = channel - layer.first_channel < layer.num_key_channels ? 0 : 1;
            uint16_t& bits = values.bits[token * values.num_channels + channel];
            const uint8_t symbol = symbols[kind][decoder.slot(token, kFrequencyBits)];
            decoder.take(token, starts[kind].start[symbol], starts[kind].start[symbol + 1] - starts[kind].start[symbol],
                         kFrequencyBits);
            if (symbol == kEscape) {
                bits = static_cast<uint16_t>(decoder.slot(token, 16));
                decoder.take(token, bits, 1, 16);
                return to_units<Dtype>(bits, parameters.exponent).whole;
            }
            int64_t first, count;
            find_step<Dtype>(parameters, prediction, symbol, first, count);
            if (count < 1) {
                outcome = {static_cast<int64_t>(index), Status::kCorrupt};
                return 0;
            }
            int64_t place = first;
            if (count > 1) {
                const auto number = static_cast<uint32_t>(count);
                const uint32_t slot = decoder.slot(token, kFrequencyBits);
                const uint32_t offset = ((slot + 1) * number - 1) >> kFrequencyBits;
                const uint32_t start = place_start(offset, number);
                decoder.take(token, start, place_start(offset + 1, number) - start, kFrequencyBits);
                place += offset;
            }
            Units units{place < 0 ? -magnitude_at<Dtype>(-place) : magnitude_at<Dtype>(place), 0, 0, false};
            const int64_t magnitude = units.whole < 0 ? -units.whole : units.whole;
            units.remainder_bits = magnitude == 0 ? 16 : std::max(0, Dtype::kMantissaBits - 1 - log2_floor(magnitude));
            if (units.remainder_bits > 0) {
                units.remainder = decoder.slot(token, units.remainder_bits);
                decoder.take(token, units.remainder, 1, units.remainder_bits);
            }
            if (!from_units<Dtype>(units, parameters.exponent, bits))
                outcome = {static_cast<int64_t>(index), Status::kCorrupt};
            return units.whole;
        },
        [&](size_t index) {
            if (outcome.status != Status::kOk) return;
            if (decoder.is_short())
                outcome = {static_cast<int64_t>(index), Status::kTruncated};
            else if (!decoder.is_at_end())
                outcome = {static_cast<int64_t>(index), Status::kCorrupt};
            else if (index + 1 < model.layers.size())
                begin_layer(index + 1);
        });
    return outcome;
}

template <class Dtype>
void count_block(const Model& model, const Values& values, uint32_t* counts) {
    walk(
        model, values.num_tokens, values.first_token,
        [&](size_t index, int64_t channel, int64_t token, int64_t prediction) {
            const Channel& parameters = model.channels[channel];
            const Layer& layer = model.layers[index];
            const uint16_t bits = values.bits[token * values.num_channels + channel];
            const Units units = to_units<Dtype>(bits, parameters.exponent);
            const int kind = channel - layer.first_channel < layer.num_key_channels ? 0 : 1;
            ++counts[(2 * index + kind) * kNumSymbols + code_value<Dtype>(parameters, prediction, bits, units).symbol];
            return units.whole;
        },
        [](size_t) {});
}

}  // namespace

namespace {

// One block of a chunk's tokens.
Values block_of(const Values& values, int64_t block) {
    const int64_t first = block * kBlockTokens;
    return {values.bits + first * values.num_channels, std::min(kBlockTokens, values.num_tokens - first),
            values.num_channels, values.first_token + first};
}

}  // namespace

void encode(const Model& model, const Values& values, int num_threads, std::vector<std::vector<uint8_t>>& streams) {
    const auto num_layers = static_cast<int64_t>(model.layers.size());
    streams.assign(num_blocks(values.num_tokens) * num_layers, {});
    parallel_for(num_blocks(values.num_tokens), num_threads, [&](int64_t block) {
        const Values part = block_of(values, block);
        auto* const first = &streams[block * num_layers];
        model.is_float16 ? encode_block<Bits<true>>(model, part, first) : encode_block<Bits<false>>(model, part, first);
    });
}

void count(const Model& model, const Values& values, uint32_t* counts) {
    model.is_float16 ? count_block<Bits<true>>(model, values, counts) : count_block<Bits<false>>(model, values, counts);
}

Outcome decode(const Model& model, const std::vector<std::pair<const uint8_t*, int64_t>>& streams, int num_threads,
               Values& values) {
    const auto num_layers = static_cast<int64_t>(model.layers.size());
    std::vector<Outcome> outcomes(num_blocks(values.num_tokens));
    parallel_for(num_blocks(values.num_tokens), num_threads, [&](int64_t block) {
        Values part = block_of(values, block);
        const auto* const first = &streams[block * num_layers];
        outcomes[block] = model.is_float16 ? decode_block<Bits<true>>(model, first, part)
                                           : decode_block<Bits<false>>(model, first, part);
        outcomes[block].stream += block * num_layers;
    });
    for (const Outcome& outcome : outcomes)
        if (outcome.status != Status::kOk) return outcome;
    return {0, Status::kOk};
}

}  // namespace cachegen::lossless
