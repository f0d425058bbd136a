#include "entries.h"

#include <math.h>
#include <string.h>

#include "codes.h"

namespace rorqual::ISA_NAMESPACE {

namespace {

int64_t end_of(int64_t begin, int64_t step, int64_t limit) {
    return begin + step < limit ? begin + step : limit;
}

void encode_record(const float* x, int64_t plain, int64_t rope, uint8_t* to) {
    uint8_t* scales = to + plain + 2 * rope;
    for (int64_t begin = 0; begin < plain; begin += kRecordScaleDims) {
        const int64_t end = end_of(begin, kRecordScaleDims, plain);
        const uint32_t code = fp8_scale(x + begin, end - begin);
        const float scale = scale_value(code);
        for (int64_t i = begin; i < end; ++i) to[i] = to_fp8(x[i] / scale);
        *scales++ = static_cast<uint8_t>(code);
    }
    for (int64_t i = 0; i < rope; ++i) {
        const uint16_t code = to_bf16(x[plain + i]);
        memcpy(to + plain + 2 * i, &code, 2);
    }
}

void decode_bf16(const uint8_t* from, int64_t count, float* x) {
    for (int64_t i = 0; i < count; ++i) {
        uint16_t code;
        memcpy(&code, from + 2 * i, 2);
        x[i] = from_bf16(code);
    }
}

void decode_record(const uint8_t* from, int64_t plain, int64_t rope, float* x) {
    const uint8_t* scales = from + plain + 2 * rope;
    for (int64_t begin = 0; begin < plain; begin += kRecordScaleDims) {
        const int64_t end = end_of(begin, kRecordScaleDims, plain);
        const float scale = scale_value(*scales++);
        for (int64_t i = begin; i < end; ++i) x[i] = from_fp8(from[i]) * scale;
    }
    decode_bf16(from + plain, rope, x + plain);
}

void hadamard(float* x, int64_t dim) {
    for (int64_t step = 1; step < dim; step *= 2)
        for (int64_t begin = 0; begin < dim; begin += 2 * step)
            for (int64_t i = begin; i < begin + step; ++i) {
                const float low = x[i], high = x[i + step];
                x[i] = low + high;
                x[i + step] = low - high;
            }
    const float norm = static_cast<float>(1.0 / sqrt(static_cast<double>(dim)));
    for (int64_t i = 0; i < dim; ++i) x[i] *= norm;
}

}  // namespace

void encode_entry(EntryFormat format, const float* x, int64_t dim, int64_t rope, uint8_t* to) {
    if (format == EntryFormat::record) return encode_record(x, dim - rope, rope, to);
    if (format == EntryFormat::fp32) {
        memcpy(to, x, static_cast<size_t>(4 * dim));
        return;
    }
    for (int64_t i = 0; i < dim; ++i) {
        const uint16_t code = to_bf16(x[i]);
        memcpy(to + 2 * i, &code, 2);
    }
}

void decode_entry(EntryFormat format, const uint8_t* from, int64_t dim, int64_t rope, float* x) {
    if (format == EntryFormat::record)
        decode_record(from, dim - rope, rope, x);
    else if (format == EntryFormat::fp32)
        memcpy(x, from, static_cast<size_t>(4 * dim));
    else
        decode_bf16(from, dim, x);
}

void round_entry(float* x, int64_t dim, int64_t rope) {
    const int64_t plain = dim - rope;
    for (int64_t begin = 0; begin < plain; begin += kRecordScaleDims) {
        const int64_t end = end_of(begin, kRecordScaleDims, plain);
        const float scale = scale_value(fp8_scale(x + begin, end - begin));
        for (int64_t i = begin; i < end; ++i) x[i] = from_fp8(to_fp8(x[i] / scale)) * scale;
    }
}

void round_index(float* x, int64_t dim, bool bf16) {
    hadamard(x, dim);
    if (bf16)
        for (int64_t i = 0; i < dim; ++i) x[i] = from_bf16(to_bf16(x[i]));
    for (int64_t begin = 0; begin < dim; begin += kFp4ScaleDims) {
        const int64_t end = end_of(begin, kFp4ScaleDims, dim);
        const float scale = scale_value(fp4_scale(x + begin, end - begin));
        for (int64_t i = begin; i < end; ++i) x[i] = from_fp4(to_fp4(x[i] / scale)) * scale;
    }
}

void encode_key(KeyFormat format, const float* x, int64_t dim, uint8_t* block, int64_t slot) {
    if (format == KeyFormat::fp32) {
        for (int64_t i = 0; i < dim; ++i)
            memcpy(block + 4 * (i * kBlockKeys + slot), x + i, 4);
    } else if (format == KeyFormat::int8) {
        const float scale = largest(x, dim) / 127.0f;
        const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
        for (int64_t i = 0; i < dim; ++i) {
            // A tiny scale can have an infinite inverse, and 0 * inf is no number.
            const float wanted = nearbyintf(x[i] * inverse);
            const float held = wanted > 127 ? 127 : wanted >= -127 ? wanted : -127;
            block[i / 4 * 4 * kBlockKeys + 4 * slot + i % 4] =
                static_cast<uint8_t>(static_cast<int8_t>(held));
        }
        memcpy(block + dim * kBlockKeys + 4 * slot, &scale, 4);
    } else {
        uint8_t* scales = block + dim / 2 * kBlockKeys + slot;
        for (int64_t begin = 0; begin < dim; begin += kFp4ScaleDims) {
            const uint32_t code = fp4_scale(x + begin, kFp4ScaleDims);
            const float scale = scale_value(code);
            *scales = static_cast<uint8_t>(code);
            scales += kBlockKeys;
            for (int64_t i = begin; i < begin + kFp4ScaleDims; i += 8)
                for (int64_t b = 0; b < 4; ++b)
                    block[i / 8 * 4 * kBlockKeys + 4 * slot + b] = static_cast<uint8_t>(
                        to_fp4(x[i + b] / scale) | to_fp4(x[i + 4 + b] / scale) << 4);
        }
    }
}

void decode_key(KeyFormat format, const uint8_t* block, int64_t slot, int64_t dim, float* x) {
    if (format == KeyFormat::fp32) {
        for (int64_t i = 0; i < dim; ++i)
            memcpy(x + i, block + 4 * (i * kBlockKeys + slot), 4);
    } else if (format == KeyFormat::int8) {
        float scale;
        memcpy(&scale, block + dim * kBlockKeys + 4 * slot, 4);
        for (int64_t i = 0; i < dim; ++i)
            x[i] = scale * static_cast<float>(static_cast<int8_t>(
                               block[i / 4 * 4 * kBlockKeys + 4 * slot + i % 4]));
    } else {
        for (int64_t i = 0; i < dim; ++i) {
            const uint8_t byte = block[i / 8 * 4 * kBlockKeys + 4 * slot + i % 4];
            const uint8_t code = block[(dim / 2 + i / kFp4ScaleDims) * kBlockKeys + slot];
            x[i] = from_fp4(i % 8 < 4 ? byte & 15 : byte >> 4) * scale_value(code);
        }
    }
}

}  // namespace rorqual::ISA_NAMESPACE
